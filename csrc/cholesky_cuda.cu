#include "cholesky_cuda.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace minisp {

namespace {

constexpr int kEdge = 64;
constexpr int kThreads = 512;

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// One thread block eliminates [A | I] in shared memory, in one array as cholesky_cpu.cpp does: 16 KB for float, 32 KB
// for double. Per step of the 64: a square root, one row scaled, the rows below updated.
template <typename T>
__global__ void __launch_bounds__(kThreads) invert_block_kernel(View<T> a, int size, T* inverse, long long first_pivot,
                                                                long long* bad_pivot) {
  __shared__ T w[kEdge][kEdge];
  const int column = threadIdx.x % kEdge, group = threadIdx.x / kEdge;
  for (int row = group; row < kEdge; row += kThreads / kEdge)
    w[row][column] = column >= row && column < size ? a.data[column * a.stride + row] : T(0);
  __syncthreads();
  for (int k = 0; k < size; ++k) {
    const T pivot = w[k][k];
    const T scale = T(1) / sqrt(pivot);
    __syncthreads();
    if (group == 0) {
      w[k][column] = column == k ? scale : w[k][column] * scale;
      // Not positive, infinite or NaN: the scale is then not a positive number.
      if (column == 0 && !(scale > T(0) && isfinite(scale)) && *bad_pivot == 0) *bad_pivot = first_pivot + k + 1;
    }
    __syncthreads();
    for (int row = k + 1 + group; row < size; row += kThreads / kEdge) {
      const T factor = w[k][row];
      if (column >= row || column <= k) w[row][column] -= factor * w[k][column];
    }
    __syncthreads();
  }
  for (int row = group; row < size; row += kThreads / kEdge) {
    if (column <= row) a.data[row * a.stride + column] = w[row][column];
    inverse[row * kEdge + column] = column <= row ? w[row][column] : T(0);
  }
}

template <typename T>
__global__ void expand_block_kernel(View<T> a, int size, T* inverse) {
  for (int i = threadIdx.x; i < size * kEdge; i += blockDim.x) {
    const int row = i / kEdge, column = i % kEdge;
    inverse[i] = column <= row ? a.data[row * a.stride + column] : T(0);
  }
}

template <typename T>
__global__ void subtract_lower_kernel(View<T> a, View<T> b, int size) {
  for (int i = threadIdx.x; i < size * size; i += blockDim.x) {
    const int row = i / size, column = i % size;
    if (column <= row) a.data[row * a.stride + column] -= b.data[row * b.stride + column];
  }
}

// cublasOperation_t: 0 is N, 1 is T; cublasStatus_t: 0 is success. Stable numbers of cuBLAS's binary interface.
template <typename T>
using CublasGemm = int (*)(void*, int, int, int, int, int, const T*, const T*, int, const T*, int, const T*, T*, int);

template <typename T>
struct CudaBackend {
  static constexpr int64_t kBlock = kEdge, kPanel = 512, work_rows = 16384;

  T* workspace;
  CublasGemm<T> gemm;
  void* handle;
  cudaStream_t stream;
  int64_t* pivot;

  bool failed() const { return false; }

  void multiply(View<T> c, View<T> a, View<T> b, Product p) {
    const T alpha = static_cast<T>(p.alpha), beta = static_cast<T>(p.beta);
    const int status = gemm(handle, p.transposed ? 1 : 0, 0, static_cast<int>(p.columns), static_cast<int>(p.rows),
                            static_cast<int>(p.depth), &alpha, b.data, static_cast<int>(b.stride), a.data,
                            static_cast<int>(a.stride), &beta, c.data, static_cast<int>(c.stride));
    if (status != 0) throw std::runtime_error("cuBLAS: gemm returned status " + std::to_string(status));
  }

  void subtract_lower(View<T> a, View<T> b, int64_t size) {
    subtract_lower_kernel<<<1, 1024, 0, stream>>>(a, b, static_cast<int>(size));
    check(cudaGetLastError());
  }

  void invert_block(View<T> a, int64_t size, T* inverse, int64_t first_pivot) {
    static_assert(sizeof(long long) == sizeof(int64_t));
    invert_block_kernel<<<1, kThreads, 0, stream>>>(a, static_cast<int>(size), inverse, first_pivot,
                                                    reinterpret_cast<long long*>(pivot));
    check(cudaGetLastError());
  }

  void expand_block(View<T> a, int64_t size, T* inverse) {
    expand_block_kernel<<<1, 1024, 0, stream>>>(a, static_cast<int>(size), inverse);
    check(cudaGetLastError());
  }

  void copy(View<T> to, View<T> from, int64_t rows, int64_t columns) {
    check(cudaMemcpy2DAsync(to.data, to.stride * sizeof(T), from.data, from.stride * sizeof(T), columns * sizeof(T),
                            rows, cudaMemcpyDefault, stream));
  }
  void upload(View<T> to, View<T> from, int64_t rows, int64_t columns) { copy(to, from, rows, columns); }
  void download(View<T> to, View<T> from, int64_t rows, int64_t columns) { copy(to, from, rows, columns); }
};

template <typename T>
CudaBackend<T> backend_of(const CudaCall& call) {
  return {static_cast<T*>(call.call.workspace), reinterpret_cast<CublasGemm<T>>(call.call.gemm), call.handle,
          static_cast<cudaStream_t>(call.stream), call.pivot};
}

}  // namespace

int64_t workspace_cuda(int64_t size, bool is_double, int64_t streamed_columns) {
  return is_double ? workspace_bytes<CudaBackend<double>>(size, streamed_columns)
                   : workspace_bytes<CudaBackend<float>>(size, streamed_columns);
}

void factor_cuda(const CudaCall& call) {
  if (call.call.is_double) {
    auto backend = backend_of<double>(call);
    with_solver<double>(backend, call.call, [](auto& solver) { solver.factor(); });
  } else {
    auto backend = backend_of<float>(call);
    with_solver<float>(backend, call.call, [](auto& solver) { solver.factor(); });
  }
}

void solve_cuda(const CudaCall& call, Place right, int64_t count) {
  if (call.call.is_double) {
    auto backend = backend_of<double>(call);
    with_solver<double>(backend, call.call, [&](auto& solver) { solver.solve(right.as<double>(), count); });
  } else {
    auto backend = backend_of<float>(call);
    with_solver<float>(backend, call.call, [&](auto& solver) { solver.solve(right.as<float>(), count); });
  }
}

}  // namespace minisp
