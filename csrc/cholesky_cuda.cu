#include "cholesky_cuda.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace minisp {

namespace {

constexpr int kTile = 4;
constexpr int kCopyThreads = 128;

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

template <typename T>
constexpr int kSide = kCudaBlock<T> / kTile;

// One thread block eliminates [A | I] in registers, a row of threads owning every kSide-th row of the block. As in
// cholesky_cpu.cpp one array holds it all: in step k, the row k, from its diagonal on what is left of A and before it
// the inverse so far, is subtracted from the rows below. Rows are scaled at the end, by 1/sqrt(pivot), so that a step
// takes one barrier: the row of the next step is published by its owners as soon as they have it, into the other of two
// buffers. Between columns k and i, row i holds numbers that nobody reads before column i overwrites them.
//
// 128 steps of at most 64 fused multiply-adds a scheduler and lane, and a barrier of 32 warps.
template <typename T>
__global__ void __launch_bounds__(kSide<T>* kSide<T>) invert_block_kernel(View<T> s, View<T> w, int size,
                                                                          long long first_pivot, long long* bad_pivot) {
  constexpr int side = kSide<T>, edge = kCudaBlock<T>;
  __shared__ T published[2][edge], pivots[edge];
  const int tx = threadIdx.x % side, ty = threadIdx.x / side;
  T own[kTile][kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const int row = ty + side * i;
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const int column = tx + side * j;
      own[i][j] = row < size && column < size ? *s.at(row, column).data : T(row == column);
    }
  }
  if (ty == 0) {
#pragma unroll
    for (int j = 0; j < kTile; ++j) published[0][tx + side * j] = own[0][j];
  }
  __syncthreads();
  for (int k = 0; k < size; ++k) {
    const T* const row_k = published[k & 1];
    const T pivot = row_k[k], reciprocal = T(1) / pivot;
    if (threadIdx.x == 0) {
      pivots[k] = pivot;
      // Not positive, infinite or NaN.
      if (!(pivot > T(0) && isfinite(pivot)) && *bad_pivot == 0) *bad_pivot = first_pivot + k + 1;
    }
    T across[kTile];
#pragma unroll
    for (int j = 0; j < kTile; ++j) across[j] = tx + side * j == k ? T(1) : row_k[tx + side * j];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const int row = ty + side * i;
      if (row <= k) continue;
      const T factor = row_k[row] * reciprocal;
#pragma unroll
      for (int j = 0; j < kTile; ++j) own[i][j] = (tx + side * j == k ? T(0) : own[i][j]) - factor * across[j];
      if (row == k + 1) {
#pragma unroll
        for (int j = 0; j < kTile; ++j) published[(k + 1) & 1][tx + side * j] = own[i][j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const int row = ty + side * i;
    if (row >= size) continue;
    const T scale = T(1) / sqrt(pivots[row]);
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const int column = tx + side * j;
      if (column < size) *w.at(row, column).data = column < row ? own[i][j] * scale : column == row ? scale : T(0);
    }
  }
}

// A thread block per row, here and below.
template <typename T>
__global__ void store_lower_kernel(View<T> a, View<T> w) {
  const int row = blockIdx.x;
  for (int column = threadIdx.x; column <= row; column += blockDim.x) *a.at(row, column).data = *w.at(row, column).data;
}

template <typename T>
__global__ void load_lower_kernel(View<T> w, View<T> a, int size) {
  const int row = blockIdx.x;
  for (int column = threadIdx.x; column < size; column += blockDim.x)
    *w.at(row, column).data = column <= row ? *a.at(row, column).data : T(0);
}

template <typename T>
__global__ void copy_kernel(View<T> to, View<T> from, int columns) {
  const int64_t row = blockIdx.x;
  for (int column = threadIdx.x; column < columns; column += blockDim.x)
    *to.at(row, column).data = *from.at(row, column).data;
}

// The nearest bfloat16 number, ties to even, as its bits.
__device__ uint16_t narrow(float value) {
  if (isnan(value)) return 0x7fc0;
  const unsigned bits = __float_as_uint(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ float widen(uint16_t bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

// Where the pieces of a matrix go: three matrices of its shape, `step` elements apart. The first is high; of the other
// two, one is high and one low.
struct Pieces {
  uint16_t* data;
  int64_t stride, step;
  bool low_last;
};

__global__ void part_kernel(View<float> from, Pieces to, int columns) {
  const int64_t row = blockIdx.x;
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    const float value = *from.at(row, column).data;
    const uint16_t high = narrow(value), low = narrow(value - widen(high));
    uint16_t* const place = to.data + row * to.stride + column;
    place[0] = high;
    place[to.step] = to.low_last ? high : low;
    place[2 * to.step] = to.low_last ? low : high;
  }
}

// Stable numbers of cuBLAS's binary interface. cublasOperation_t: 0 is N, 1 is T. cudaDataType_t: 0 is float, 1 double,
// 14 bfloat16. cublasComputeType_t: 68 is float, 70 double. cublasGemmAlgo_t: -1 leaves the choice to cuBLAS.
// cublasStatus_t: 0 is success.
using CublasGemmEx = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                             const void*, void*, int, int, int, int);
constexpr int kFloat = 0, kDouble = 1, kBfloat16 = 14, kComputeFloat = 68, kComputeDouble = 70, kAnyAlgorithm = -1;

template <typename T>
struct CudaBackend {
  static constexpr int64_t kBlock = kCudaBlock<T>, kPanel = kWidePanel;
  static constexpr bool kIsDouble = sizeof(T) == 8;

  CublasGemmEx gemm;
  void* handle;
  cudaStream_t stream;
  int64_t* pivot;
  uint16_t *rows_in_pieces = nullptr, *columns_in_pieces = nullptr;

  explicit CudaBackend(const CudaCall& call)
      : gemm(reinterpret_cast<CublasGemmEx>(call.call.gemm)),
        handle(call.handle),
        stream(static_cast<cudaStream_t>(call.stream)),
        pivot(call.pivot) {
    if (call.pieces == nullptr) return;
    rows_in_pieces = static_cast<uint16_t*>(call.pieces);
    columns_in_pieces = rows_in_pieces + call.call.work_rows * 3 * kPieceColumns;
  }

  bool failed() const { return false; }

  void multiply(View<T> c, View<T> a, View<T> b, Product p) {
    if constexpr (!kIsDouble) {
      if (p.large && rows_in_pieces != nullptr) {
        multiply_in_pieces(c, a, b, p);
        return;
      }
    }
    call_gemm(c, a, b, p, kIsDouble ? kDouble : kFloat);
  }

  void multiply_in_pieces(View<float> c, View<float> a, View<float> b, Product p) {
    for (int64_t first = 0; first < p.depth; first += kPieceColumns) {
      const int64_t depth = p.depth - first < kPieceColumns ? p.depth - first : kPieceColumns;
      const Product deep{p.rows, p.columns, 3 * depth, p.transposed, p.alpha, first == 0 ? p.beta : 1.0, true};
      const Pieces left{rows_in_pieces, 3 * depth, depth, false};
      part(a.at(0, first), left, p.rows, depth);
      // Along the depth the three lie side by side in the rows of B^T, one above the other in B.
      const Pieces right = p.transposed ? Pieces{columns_in_pieces, 3 * depth, depth, true}
                                        : Pieces{columns_in_pieces, p.columns, depth * p.columns, true};
      if (p.transposed) {
        part(b.at(0, first), right, p.columns, depth);
      } else {
        part(b.at(first, 0), right, depth, p.columns);
      }
      call_gemm(c, View<uint16_t>{left.data, left.stride}, View<uint16_t>{right.data, right.stride}, deep, kBfloat16);
    }
  }

  void part(View<float> from, Pieces to, int64_t rows, int64_t columns) {
    part_kernel<<<static_cast<unsigned>(rows), kCopyThreads, 0, stream>>>(from, to, static_cast<int>(columns));
    check(cudaGetLastError());
  }

  // cuBLAS's matrices are column-major: it is asked for C^T = op(B)^T A^T.
  template <typename Input>
  void call_gemm(View<T> c, View<Input> a, View<Input> b, Product p, int input) {
    const T alpha = static_cast<T>(p.alpha), beta = static_cast<T>(p.beta);
    const int status =
        gemm(handle, p.transposed ? 1 : 0, 0, static_cast<int>(p.columns), static_cast<int>(p.rows),
             static_cast<int>(p.depth), &alpha, b.data, input, static_cast<int>(b.stride), a.data, input,
             static_cast<int>(a.stride), &beta, c.data, kIsDouble ? kDouble : kFloat, static_cast<int>(c.stride),
             kIsDouble ? kComputeDouble : kComputeFloat, kAnyAlgorithm);
    if (status != 0) throw std::runtime_error("cuBLAS: cublasGemmEx returned status " + std::to_string(status));
  }

  void clear(View<T> w, int64_t size) {
    check(cudaMemset2DAsync(w.data, w.stride * sizeof(T), 0, size * sizeof(T), size, stream));
  }

  void invert_block(View<T> s, View<T> w, int64_t size, int64_t first_pivot) {
    static_assert(sizeof(long long) == sizeof(int64_t));
    invert_block_kernel<<<1, kSide<T> * kSide<T>, 0, stream>>>(s, w, static_cast<int>(size), first_pivot,
                                                               reinterpret_cast<long long*>(pivot));
    check(cudaGetLastError());
  }

  void store_lower(View<T> a, View<T> w, int64_t size) {
    store_lower_kernel<<<static_cast<unsigned>(size), kCopyThreads, 0, stream>>>(a, w);
    check(cudaGetLastError());
  }

  void load_lower(View<T> w, View<T> a, int64_t size) {
    load_lower_kernel<<<static_cast<unsigned>(size), kCopyThreads, 0, stream>>>(w, a, static_cast<int>(size));
    check(cudaGetLastError());
  }

  void copy(View<T> to, View<T> from, int64_t rows, int64_t columns) {
    copy_kernel<<<static_cast<unsigned>(rows), kCopyThreads, 0, stream>>>(to, from, static_cast<int>(columns));
    check(cudaGetLastError());
  }
};

template <typename T>
void factor(const CudaCall& call) {
  CudaBackend<T> backend(call);
  Cholesky<T, CudaBackend<T>>(backend, call.call).factor();
}

template <typename T>
void solve(const CudaCall& call, Place right, int64_t count) {
  CudaBackend<T> backend(call);
  Cholesky<T, CudaBackend<T>>(backend, call.call).solve(right.as<T>(), count);
}

}  // namespace

void factor_cuda(const CudaCall& call) { call.call.is_double ? factor<double>(call) : factor<float>(call); }

void solve_cuda(const CudaCall& call, Place right, int64_t count) {
  call.call.is_double ? solve<double>(call, right, count) : solve<float>(call, right, count);
}

}  // namespace minisp
