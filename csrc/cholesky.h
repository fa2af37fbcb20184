// Blocked Cholesky factorisation A = L L^T and the solution of X A = R, written once for every device.
//
// Matrices are row-major. A is (n, n); only its lower triangle is written, so that the matrix itself stays readable
// above the diagonal: for the residual, for refinement, and for another attempt. The diagonal of A is overwritten.
// R is (d, n), a right-hand side per row, and becomes X = R A^-1.
//
// The lower triangle becomes L with the diagonal blocks of kBlock columns replaced by their inverses: all substitution
// is then matrix products (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 8.2 and chapter
// 14, on the error of solving with inverted blocks). Columns are worked off in panels of kPanel, left-looking: a panel
// first takes up what all panels before it contribute, in products that are as deep as there are columns before it.
//
//   n^3/3 + d n^2 * 2 FLOPs; n/kBlock diagonal blocks; every panel reads the panels before it once.
//
// A Backend is a table of operations on its own kind of memory:
//
//   multiply(c, a, b, product)        C <- alpha A op(B) + beta C
//   subtract_lower(a, b, size)        the lower triangle, diagonal included, of a square of A loses that of B
//   invert_block(a, size, inverse, p) factor a diagonal block, whose first pivot is number p, and leave the inverse of
//                                     its factor in its lower triangle, and as a full square, zeros above, in `inverse`
//   expand_block(a, size, inverse)    the full square again from the lower triangle
//   copy(to, from, rows, columns)
//   upload, download                  the same, from and to the memory where a streamed A is
//   failed()                          whether to stop early
//   workspace                         room for work_rows * kBlock + 2 * kBlock * kBlock elements
//   kBlock, kPanel, work_rows         columns of a diagonal block and of a panel; rows that go through the workspace
//
// A Store says where A is. `panel(first, last, rows_from)` makes rows >= rows_from of a range of columns available,
// `earlier` does so for columns before the panel, at most `step(first)` at a time, and `keep(first, last)` ends the
// writing of a panel.
#pragma once

#include <algorithm>
#include <cstdint>

namespace minisp {

template <typename T>
struct View {
  T* data;
  int64_t stride;

  View at(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};

struct Product {
  int64_t rows, columns, depth;
  bool transposed;  // op(B) = B^T
  double alpha, beta;
};

template <typename T, typename Backend, typename Store>
class Cholesky {
 public:
  Cholesky(Backend& backend, Store& store, int64_t size) : backend_(backend), store_(store), size_(size) {}

  void factor() {
    for (int64_t first = 0; first < size_ && !backend_.failed(); first += kPanel) {
      const int64_t last = std::min(first + kPanel, size_);
      const View<T> panel = store_.panel(first, last, first);
      for (int64_t from = 0; from < first;) {
        const int64_t to = std::min(from + store_.step(first), first);
        const View<T> earlier = store_.earlier(from, to, first);
        update(panel, {first, last}, earlier, {from, to});
        from = to;
      }
      for (int64_t block = first; block < last && !backend_.failed(); block += kBlock) {
        const int64_t end = std::min(block + kBlock, last);
        update(panel, {block, end}, panel, {first, block});
        backend_.invert_block(panel.at(block, block), end - block, inverse(), block);
        solve_rows(panel.at(end, block), size_ - end, end - block, true);
      }
      store_.keep(first, last);
    }
  }

  void solve(View<T> right, int64_t count) {
    if (size_ == 0) return;
    for (int64_t first = 0; first < size_; first += kPanel) forward(right, count, first);
    for (int64_t first = (size_ - 1) / kPanel * kPanel; first >= 0; first -= kPanel) backward(right, count, first);
  }

 private:
  static constexpr int64_t kBlock = Backend::kBlock, kPanel = Backend::kPanel;

  struct Range {
    int64_t first, last;
  };

  T* work() { return backend_.workspace; }
  T* inverse() { return backend_.workspace + backend_.work_rows * kBlock; }
  T* square() { return inverse() + kBlock * kBlock; }

  // C <- C - A op(B) over the columns `depth` of A.
  void subtract(View<T> c, View<T> a, View<T> b, int64_t rows, int64_t columns, Range depth, bool transposed) {
    if (rows > 0 && columns > 0 && depth.last > depth.first)
      backend_.multiply(c, a, b, {rows, columns, depth.last - depth.first, transposed, -1.0, 1.0});
  }

  // The lower part of `columns` loses what the columns `from` of L contribute.
  void update(View<T> panel, Range columns, View<T> earlier, Range from) {
    if (from.first == from.last) return;
    const int64_t width = columns.last - columns.first, k = from.first;
    subtract(panel.at(columns.last, columns.first), earlier.at(columns.last, k), earlier.at(columns.first, k),
             size_ - columns.last, width, from, true);
    for (int64_t block = columns.first; block < columns.last; block += kBlock) {
      const int64_t end = std::min(block + kBlock, columns.last);
      subtract(panel.at(end, block), earlier.at(end, k), earlier.at(block, k), columns.last - end, end - block, from, true);
      const View<T> product{square(), kBlock}, rows = earlier.at(block, k);
      backend_.multiply(product, rows, rows, {end - block, end - block, from.last - from.first, true, 1.0, 0.0});
      backend_.subtract_lower(panel.at(block, block), product, end - block);
    }
  }

  // rows <- rows op(inverse), a few at a time through the workspace.
  void solve_rows(View<T> rows, int64_t count, int64_t width, bool transposed) {
    for (int64_t row = 0; row < count; row += backend_.work_rows) {
      const int64_t part = std::min(backend_.work_rows, count - row);
      const View<T> result{work(), kBlock};
      backend_.multiply(result, rows.at(row, 0), {inverse(), kBlock}, {part, width, width, transposed, 1.0, 0.0});
      backend_.copy(rows.at(row, 0), result, part, width);
    }
  }

  // Y L^T = R, a panel of Y; later columns of R lose what it contributes.
  void forward(View<T> right, int64_t count, int64_t first) {
    const int64_t last = std::min(first + kPanel, size_);
    const View<T> panel = store_.panel(first, last, first);
    for (int64_t block = first; block < last; block += kBlock) {
      const int64_t end = std::min(block + kBlock, last);
      subtract(right.at(0, block), right.at(0, first), panel.at(block, first), count, end - block, {first, block}, true);
      backend_.expand_block(panel.at(block, block), end - block, inverse());
      solve_rows(right.at(0, block), count, end - block, true);
    }
    subtract(right.at(0, last), right.at(0, first), panel.at(last, first), count, size_ - last, {first, last}, true);
  }

  // X L = Y, a panel of X, which first loses what the later columns contribute.
  void backward(View<T> right, int64_t count, int64_t first) {
    const int64_t last = std::min(first + kPanel, size_);
    const View<T> panel = store_.panel(first, last, first);
    subtract(right.at(0, first), right.at(0, last), panel.at(last, first), count, last - first, {last, size_}, false);
    for (int64_t block = first + (last - first - 1) / kBlock * kBlock; block >= first; block -= kBlock) {
      const int64_t end = std::min(block + kBlock, last);
      subtract(right.at(0, block), right.at(0, end), panel.at(end, block), count, end - block, {end, last}, false);
      backend_.expand_block(panel.at(block, block), end - block, inverse());
      solve_rows(right.at(0, block), count, end - block, false);
    }
  }

  Backend& backend_;
  Store& store_;
  int64_t size_;
};

// All of A in the backend's own memory.
template <typename T>
struct Resident {
  View<T> matrix;

  View<T> panel(int64_t, int64_t, int64_t) { return matrix; }
  View<T> earlier(int64_t, int64_t, int64_t) { return matrix; }
  int64_t step(int64_t first) const { return first; }
  void keep(int64_t, int64_t) {}
};

// A in memory that the backend copies from and to (`upload`, `download`): one panel and a range of earlier columns are
// in the backend's own memory at a time, each with room for `rows` of `columns` elements.
template <typename T, typename Backend>
struct Streamed {
  Backend& backend;
  View<T> source;
  int64_t size;
  T *panel_buffer, *earlier_buffer;
  int64_t earlier_columns;

  View<T> panel(int64_t first, int64_t last, int64_t rows_from) {
    return load(panel_buffer, Backend::kPanel, first, last, rows_from);
  }
  View<T> earlier(int64_t first, int64_t last, int64_t rows_from) {
    return load(earlier_buffer, earlier_columns, first, last, rows_from);
  }
  int64_t step(int64_t) const { return earlier_columns; }
  // The square on the diagonal holds the factor below the diagonal and the matrix above: it goes back whole.
  void keep(int64_t first, int64_t last) {
    backend.download(source.at(first, first), {panel_buffer, Backend::kPanel}, size - first, last - first);
  }

 private:
  // A view in which (row, column) of the whole matrix is where the copy has it.
  View<T> load(T* buffer, int64_t stride, int64_t first, int64_t last, int64_t rows_from) {
    backend.upload({buffer, stride}, source.at(rows_from, first), size - rows_from, last - first);
    return {buffer - rows_from * stride - first, stride};
  }
};

// A row-major matrix of either type.
struct Place {
  void* data;
  int64_t stride;

  template <typename T>
  View<T> as() const {
    return {static_cast<T*>(data), stride};
  }
};

// One call of the solver, on whichever device.
struct CholeskyCall {
  Place matrix;      // A (size, size)
  int64_t size;
  bool is_double;
  void* workspace;   // as many bytes as the function below says
  void* gemm;        // address of Fortran's sgemm or dgemm with 32-bit integers
  int64_t streamed_columns;  // 0: A is worked on in place; else: copied in panels, that many earlier columns at a time
};

template <typename Backend>
int64_t workspace_bytes(int64_t size, int64_t streamed_columns) {
  const int64_t fixed = (Backend::work_rows + 2 * Backend::kBlock) * Backend::kBlock;
  const int64_t streamed = streamed_columns ? size * (Backend::kPanel + streamed_columns) : 0;
  return (fixed + streamed) * static_cast<int64_t>(sizeof(*Backend::workspace));
}

// Calls run(solver) for A where the call says it is.
template <typename T, typename Backend, typename Run>
void with_solver(Backend& backend, const CholeskyCall& call, Run run) {
  const View<T> matrix = call.matrix.as<T>();
  if (call.streamed_columns == 0) {
    Resident<T> store{matrix};
    Cholesky<T, Backend, Resident<T>> solver(backend, store, call.size);
    run(solver);
    return;
  }
  T* const buffers = backend.workspace + workspace_bytes<Backend>(0, 0) / static_cast<int64_t>(sizeof(T));
  Streamed<T, Backend> store{backend, matrix, call.size, buffers, buffers + call.size * Backend::kPanel,
                             call.streamed_columns};
  Cholesky<T, Backend, Streamed<T, Backend>> solver(backend, store, call.size);
  run(solver);
}

}  // namespace minisp
