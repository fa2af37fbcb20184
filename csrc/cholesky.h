// Blocked Cholesky factorisation A = L L^T and the solution of X A = R, written once for every device.
//
// Matrices are row-major. A is (n, n); only its lower triangle is written, so that the matrix itself stays readable
// above the diagonal: for the residual, for refinement, and for another attempt. The diagonal of A is overwritten.
// R is (d, n), a right-hand side per row, and becomes X = R A^-1.
//
// Columns are worked off in panels of kPanel. The lower triangle becomes L with the square of each panel on the
// diagonal replaced by the inverse of its factor, so that all substitution is matrix products (Higham, "Accuracy and
// Stability of Numerical Algorithms", 2nd ed., section 8.2 and chapter 14, on the error of solving with inverted
// blocks). All is left-looking: a panel, of A or of R, is copied, loses in one product what the panels before it
// contribute, and is multiplied by one inverse on its way back. The square of a panel of A, which is symmetric as it
// stands, is factored and inverted by halves in the copy.
//
//   n^3/3 + d n^2 * 2 FLOPs, and (n^2 + 2 d n) * kPanel more because squares are multiplied as a whole.
//
// A Backend is a table of operations on its own kind of memory:
//
//   multiply(c, a, b, product)        C <- alpha A op(B) + beta C
//   clear(w, size)                    a square of W <- 0
//   invert_block(s, w, size, p)       W <- the inverse of the factor of a symmetric block, zeros above its diagonal, whose
//                                     first pivot is number p; S may be overwritten; size <= kBlock
//   store_lower(a, w, size)           the lower triangle of A <- that of W
//   load_lower(w, a, size)            W <- the lower triangle of A, zeros above
//   copy(to, from, rows, columns)
//   failed()                          whether to stop early
//   kBlock, kPanel                    columns of a block that is inverted at once, and of a panel: kBlock * 2^k
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define MINISP_ANYWHERE __host__ __device__
#else
#define MINISP_ANYWHERE
#endif

namespace minisp {

template <typename T>
struct View {
  T* data;
  int64_t stride;

  MINISP_ANYWHERE View at(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};

struct Product {
  int64_t rows, columns, depth;
  bool transposed;  // op(B) = B^T
  double alpha, beta;
  bool large;  // nearly all of the work, as opposed to what is done to one square
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
  Place matrix;       // A (size, size)
  int64_t size;
  bool is_double;
  int64_t panel;      // columns of a panel: the backend has code for it
  void* workspace;    // as many bytes as workspace_bytes says
  int64_t work_rows;  // rows of a panel in the workspace, at least `size`: so many right-hand sides are solved at once
  void* gemm;         // who multiplies; see the backend
  void* large_gemm;   // who makes the large products on a CPU: the same, but in tests of rounding
};

// Columns of a panel where products with it shall be limited by arithmetic on a GPU.
constexpr int64_t kWidePanel = 512;

inline int64_t workspace_bytes(int64_t panel, int64_t work_rows, bool is_double) {
  return (work_rows + panel) * panel * (is_double ? 8 : 4);
}

template <typename T, typename Backend>
class Cholesky {
 public:
  Cholesky(Backend& backend, const CholeskyCall& call)
      : backend_(backend), matrix_(call.matrix.as<T>()), size_(call.size), work_rows_(call.work_rows) {
    T* const workspace = static_cast<T*>(call.workspace);
    inverse_ = {workspace, kPanel};
    work_ = {workspace + kPanel * kPanel, kPanel};
  }

  void factor() {
    // Above the squares that are inverted at once, nobody writes afterwards.
    backend_.clear(inverse_, kPanel);
    for (int64_t first = 0; first < size_; first += kPanel) {
      const int64_t last = std::min(first + kPanel, size_), width = last - first, below = size_ - last;
      const View<T> row = matrix_.at(first, 0);
      backend_.copy(work_, matrix_.at(first, first), size_ - first, width);
      subtract(work_, row, row, {size_ - first, width, first, true, -1.0, 1.0, true});
      invert(0, width, first);
      if (backend_.failed()) return;
      backend_.store_lower(matrix_.at(first, first), inverse_, width);
      times_inverse(matrix_.at(last, first), work_.at(width, 0), {below, width, width, true, 1.0, 0.0, true});
    }
  }

  void solve(View<T> right, int64_t count) {
    if (size_ == 0) return;
    for (int64_t row = 0; row < count; row += work_rows_) substitute(right.at(row, 0), std::min(work_rows_, count - row));
  }

 private:
  static constexpr int64_t kBlock = Backend::kBlock, kPanel = Backend::kPanel;

  // C <- C - A op(B).
  void subtract(View<T> c, View<T> a, View<T> b, Product product) {
    if (product.rows > 0 && product.depth > 0) backend_.multiply(c, a, b, product);
  }

  void times_inverse(View<T> rows, View<T> work, Product product) {
    if (product.rows > 0) backend_.multiply(rows, work, inverse_, product);
  }

  // Y L^T = R, then X L = Y.
  void substitute(View<T> right, int64_t count) {
    for (int64_t first = 0; first < size_; first += kPanel) {
      const int64_t width = std::min(kPanel, size_ - first);
      backend_.copy(work_, right.at(0, first), count, width);
      subtract(work_, right, matrix_.at(first, 0), {count, width, first, true, -1.0, 1.0, true});
      backend_.load_lower(inverse_, matrix_.at(first, first), width);
      times_inverse(right.at(0, first), work_, {count, width, width, true, 1.0, 0.0, true});
    }
    for (int64_t first = (size_ - 1) / kPanel * kPanel; first >= 0 && size_ > 0; first -= kPanel) {
      const int64_t last = std::min(first + kPanel, size_), width = last - first;
      backend_.copy(work_, right.at(0, first), count, width);
      subtract(work_, right.at(0, last), matrix_.at(last, first), {count, width, size_ - last, false, -1.0, 1.0, true});
      backend_.load_lower(inverse_, matrix_.at(first, first), width);
      times_inverse(right.at(0, first), work_, {count, width, width, false, 1.0, 0.0, true});
    }
  }

  // Of the symmetric square whose corner is (at, at) in work_, the inverse of the factor, into inverse_. With
  //
  //   A = (A11 A21^T; A21 A22), W11 = L11^-1:  L21 = A21 W11^T,  A22 - L21 L21^T = L22 L22^T,  W21 = -W22 L21 W11.
  //
  // L21 is kept where A12 was, L21 W11 where A21 was: `half` is at least the rest, so that it has room there.
  void invert(int64_t at, int64_t size, int64_t pivot) {
    const View<T> a = work_.at(at, at), w = inverse_.at(at, at);
    if (size <= kBlock) {
      backend_.invert_block(a, w, size, pivot);
      return;
    }
    int64_t half = kBlock;
    while (2 * half < size) half *= 2;
    const int64_t rest = size - half;
    const View<T> below = a.at(half, 0), beside = a.at(0, half), corner = a.at(half, half);
    invert(at, half, pivot);
    if (backend_.failed()) return;
    backend_.multiply(beside, below, w, {rest, half, half, true, 1.0, 0.0, false});
    backend_.multiply(corner, beside, beside, {rest, rest, half, true, -1.0, 1.0, false});
    invert(at + half, rest, pivot + half);
    if (backend_.failed()) return;
    backend_.multiply(below, beside, w, {rest, half, half, false, 1.0, 0.0, false});
    backend_.multiply(w.at(half, 0), w.at(half, half), below, {rest, half, rest, false, -1.0, 0.0, false});
  }

  Backend& backend_;
  View<T> matrix_, inverse_{}, work_{};
  int64_t size_, work_rows_;
};

}  // namespace minisp
