#include "cholesky_cpu.h"

#include <cstring>

#include "level.h"

namespace minisp {

namespace {

constexpr int64_t kEdge = kEliminated;

template <typename T>
struct CpuBackend {
  static constexpr int64_t kBlock = kEdge, kPanel = 512, work_rows = 256;
  using GemmFunction = void (*)(const char*, const char*, const int*, const int*, const int*, const T*, const T*,
                                const int*, const T*, const int*, const T*, T*, const int*);

  T* workspace;
  GemmFunction gemm;
  int64_t failed_pivot = 0;

  bool failed() const { return failed_pivot != 0; }

  // Fortran's matrices are column-major: it is asked for C^T = op(B)^T A^T.
  void multiply(View<T> c, View<T> a, View<T> b, Product p) {
    const int rows = static_cast<int>(p.rows), columns = static_cast<int>(p.columns), depth = static_cast<int>(p.depth);
    const int lda = static_cast<int>(a.stride), ldb = static_cast<int>(b.stride), ldc = static_cast<int>(c.stride);
    const T alpha = static_cast<T>(p.alpha), beta = static_cast<T>(p.beta);
    gemm(p.transposed ? "T" : "N", "N", &columns, &rows, &depth, &alpha, b.data, &ldb, a.data, &lda, &beta, c.data, &ldc);
  }

  void subtract_lower(View<T> a, View<T> b, int64_t size) {
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j <= i; ++j) *a.at(i, j).data -= *b.at(i, j).data;
  }

  void invert_block(View<T> a, int64_t size, T* inverse, int64_t first_pivot) {
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j) inverse[i * kEdge + j] = j < i ? T(0) : *a.at(j, i).data;
    int64_t pivot;
    if constexpr (sizeof(T) == 4) {
      pivot = kernels().eliminate_float(inverse, size);
    } else {
      pivot = kernels().eliminate_double(inverse, size);
    }
    if (pivot >= 0) {
      failed_pivot = first_pivot + pivot + 1;
      return;
    }
    for (int64_t i = 0; i < size; ++i) {
      std::memcpy(a.at(i, 0).data, inverse + i * kEdge, (i + 1) * sizeof(T));
      std::memset(inverse + i * kEdge + i + 1, 0, (size - i - 1) * sizeof(T));
    }
  }

  void expand_block(View<T> a, int64_t size, T* inverse) {
    for (int64_t i = 0; i < size; ++i) {
      std::memcpy(inverse + i * kEdge, a.at(i, 0).data, (i + 1) * sizeof(T));
      std::memset(inverse + i * kEdge + i + 1, 0, (size - i - 1) * sizeof(T));
    }
  }

  void copy(View<T> to, View<T> from, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) std::memcpy(to.at(i, 0).data, from.at(i, 0).data, columns * sizeof(T));
  }

  // The backend's "own" memory is the same memory here: streaming serves to test it where there is no GPU.
  void upload(View<T> to, View<T> from, int64_t rows, int64_t columns) { copy(to, from, rows, columns); }
  void download(View<T> to, View<T> from, int64_t rows, int64_t columns) { copy(to, from, rows, columns); }
};

template <typename T>
CpuBackend<T> backend_of(const CholeskyCall& call) {
  return {static_cast<T*>(call.workspace), reinterpret_cast<typename CpuBackend<T>::GemmFunction>(call.gemm)};
}

template <typename T>
int64_t factor(const CholeskyCall& call) {
  auto backend = backend_of<T>(call);
  with_solver<T>(backend, call, [](auto& solver) { solver.factor(); });
  return backend.failed_pivot;
}

template <typename T>
void solve(const CholeskyCall& call, Place right, int64_t count) {
  auto backend = backend_of<T>(call);
  with_solver<T>(backend, call, [&](auto& solver) { solver.solve(right.as<T>(), count); });
}

}  // namespace

int64_t workspace_cpu(int64_t size, bool is_double, int64_t streamed_columns) {
  return is_double ? workspace_bytes<CpuBackend<double>>(size, streamed_columns)
                   : workspace_bytes<CpuBackend<float>>(size, streamed_columns);
}

int64_t factor_cpu(const CholeskyCall& call) { return call.is_double ? factor<double>(call) : factor<float>(call); }

void solve_cpu(const CholeskyCall& call, Place right, int64_t count) {
  call.is_double ? solve<double>(call, right, count) : solve<float>(call, right, count);
}

}  // namespace minisp
