#include "cholesky_cpu.h"

#include <cstring>

#include "level.h"

namespace minisp {

namespace {

constexpr int64_t kEdge = kEliminated;

template <typename T, int64_t kColumns>
struct CpuBackend {
  static constexpr int64_t kBlock = kEdge, kPanel = kColumns;
  using GemmFunction = void (*)(const char*, const char*, const int*, const int*, const int*, const T*, const T*,
                                const int*, const T*, const int*, const T*, T*, const int*);

  GemmFunction gemm, large_gemm;
  int64_t failed_pivot = 0;

  explicit CpuBackend(const CholeskyCall& call)
      : gemm(reinterpret_cast<GemmFunction>(call.gemm)), large_gemm(reinterpret_cast<GemmFunction>(call.large_gemm)) {}

  bool failed() const { return failed_pivot != 0; }

  // Fortran's matrices are column-major: it is asked for C^T = op(B)^T A^T.
  void multiply(View<T> c, View<T> a, View<T> b, Product p) {
    const int rows = static_cast<int>(p.rows), columns = static_cast<int>(p.columns), depth = static_cast<int>(p.depth);
    const int lda = static_cast<int>(a.stride), ldb = static_cast<int>(b.stride), ldc = static_cast<int>(c.stride);
    const T alpha = static_cast<T>(p.alpha), beta = static_cast<T>(p.beta);
    (p.large ? large_gemm : gemm)(p.transposed ? "T" : "N", "N", &columns, &rows, &depth, &alpha, b.data, &ldb, a.data,
                                  &lda, &beta, c.data, &ldc);
  }

  void clear(View<T> w, int64_t size) {
    for (int64_t i = 0; i < size; ++i) std::memset(w.at(i, 0).data, 0, size * sizeof(T));
  }

  void invert_block(View<T> s, View<T> w, int64_t size, int64_t first_pivot) {
    for (int64_t i = 0; i < size; ++i) {
      std::memset(w.at(i, 0).data, 0, i * sizeof(T));
      std::memcpy(w.at(i, i).data, s.at(i, i).data, (size - i) * sizeof(T));
    }
    int64_t pivot;
    if constexpr (sizeof(T) == 4) {
      pivot = kernels().eliminate_float(w.data, w.stride, size);
    } else {
      pivot = kernels().eliminate_double(w.data, w.stride, size);
    }
    if (pivot >= 0) failed_pivot = first_pivot + pivot + 1;
    for (int64_t i = 0; i < size; ++i) std::memset(w.at(i, i + 1).data, 0, (size - i - 1) * sizeof(T));
  }

  void store_lower(View<T> a, View<T> w, int64_t size) {
    for (int64_t i = 0; i < size; ++i) std::memcpy(a.at(i, 0).data, w.at(i, 0).data, (i + 1) * sizeof(T));
  }

  void load_lower(View<T> w, View<T> a, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      std::memcpy(w.at(i, 0).data, a.at(i, 0).data, (i + 1) * sizeof(T));
      std::memset(w.at(i, i + 1).data, 0, (size - i - 1) * sizeof(T));
    }
  }

  void copy(View<T> to, View<T> from, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) std::memcpy(to.at(i, 0).data, from.at(i, 0).data, columns * sizeof(T));
  }
};

template <typename T, int64_t kColumns>
int64_t factor(const CholeskyCall& call) {
  using Backend = CpuBackend<T, kColumns>;
  Backend backend(call);
  Cholesky<T, Backend>(backend, call).factor();
  return backend.failed_pivot;
}

template <typename T, int64_t kColumns>
void solve(const CholeskyCall& call, Place right, int64_t count) {
  using Backend = CpuBackend<T, kColumns>;
  Backend backend(call);
  Cholesky<T, Backend>(backend, call).solve(right.as<T>(), count);
}

}  // namespace

int64_t factor_cpu(const CholeskyCall& call) {
  if (call.panel == kWidePanel)
    return call.is_double ? factor<double, kWidePanel>(call) : factor<float, kWidePanel>(call);
  return call.is_double ? factor<double, kEdge>(call) : factor<float, kEdge>(call);
}

void solve_cpu(const CholeskyCall& call, Place right, int64_t count) {
  if (call.panel == kWidePanel) {
    call.is_double ? solve<double, kWidePanel>(call, right, count) : solve<float, kWidePanel>(call, right, count);
  } else {
    call.is_double ? solve<double, kEdge>(call, right, count) : solve<float, kEdge>(call, right, count);
  }
}

}  // namespace minisp
