// The Cholesky solver on a CUDA device, over the cuBLAS that the process has loaded.
//
// Everything is queued on the caller's stream; nothing waits and nothing is allocated.
#pragma once

#include <cstdint>

#include "cholesky.h"

namespace minisp {

// A block is eliminated in the registers of one thread block, 16 elements a thread. Panels are of kWidePanel columns.
template <typename T>
constexpr int kCudaBlock = sizeof(T) == 4 ? 128 : 64;

// Large float32 products can be made of bfloat16 ones, which the tensor cores do: every number is parted in two pieces
// of 8 bits of mantissa each, v = high + low + O(2^-17 v), and
//
//   a b = high high' + low high' + high low' + O(2^-16 a b)
//
// is one product three times as deep, summed in float32. So many columns of the depth are parted at once.
constexpr int64_t kPieceColumns = 1024;

struct CudaCall {
  CholeskyCall call;  // matrix and workspace on the device; gemm is the address of cublasGemmEx
  void* handle;       // cublasHandle_t, which must use `stream` and multiply float32 in full precision
  void* stream;       // cudaStream_t
  int64_t* pivot;     // on the device, 0 at first; becomes the number of the first bad pivot, counted from 1
  void* pieces;       // room for (work_rows + kWidePanel) * 3 * kPieceColumns bfloat16 numbers; null: products in full
};

#ifdef MINISP_WITH_CUDA

// As factor_cpu and solve_cpu. After a bad pivot the work goes on with numbers of no meaning: ask `pivot` at the end.
// Throws std::runtime_error where CUDA or cuBLAS refuses a call.
void factor_cuda(const CudaCall& call);
void solve_cuda(const CudaCall& call, Place right, int64_t count);

#endif

}  // namespace minisp
