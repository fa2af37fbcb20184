#include "cholesky_count.h"

#include "cholesky_cuda.h"

namespace minisp {

namespace {

template <typename T>
struct CountingBackend {
  static constexpr int64_t kBlock = kCudaBlock<T>, kPanel = kWidePanel;

  bool pieces;
  CholeskyCount found{};

  bool failed() const { return false; }
  void multiply(View<T>, View<T>, View<T>, Product p) {
    (p.large ? found.large_flops : found.flops) += 2.0 * p.rows * p.columns * p.depth;
    const int64_t chunks = pieces && p.large ? (p.depth + kPieceColumns - 1) / kPieceColumns : 1;
    found.products += chunks;
    found.copies += pieces && p.large ? 2 * chunks : 0;
  }
  void clear(View<T>, int64_t) { ++found.copies; }
  void invert_block(View<T>, View<T>, int64_t, int64_t) { ++found.inversions; }
  void store_lower(View<T>, View<T>, int64_t) { ++found.copies; }
  void load_lower(View<T>, View<T>, int64_t) { ++found.copies; }
  void copy(View<T>, View<T>, int64_t, int64_t) { ++found.copies; }
};

// Nothing behind an address is read or written: the matrices need not exist.
template <typename T>
CholeskyCount count(int64_t size, int64_t sides, bool pieces) {
  T* const nowhere = reinterpret_cast<T*>(alignof(T));
  CountingBackend<T> backend{pieces};
  CholeskyCall call{{nowhere, 0}, size, sizeof(T) == 8, kWidePanel, nowhere, size, nullptr, nullptr};
  Cholesky<T, CountingBackend<T>> solver(backend, call);
  solver.factor();
  if (sides > 0) solver.solve({nowhere, 0}, sides);
  return backend.found;
}

}  // namespace

CholeskyCount count_cuda(int64_t size, int64_t sides, bool is_double, bool pieces) {
  return is_double ? count<double>(size, sides, false) : count<float>(size, sides, pieces);
}

}  // namespace minisp
