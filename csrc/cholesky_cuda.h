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

struct CudaCall {
  CholeskyCall call;  // matrix and workspace on the device; gemm is the address of cublasGemmEx
  void* handle;       // cublasHandle_t, which must use `stream` and multiply in full precision unless told otherwise
  void* stream;       // cudaStream_t
  int64_t* pivot;     // on the device, 0 at first; becomes the number of the first bad pivot, counted from 1
  bool tf32;          // whether large float32 products round their inputs to 10 bits of mantissa
};

#ifdef MINISP_WITH_CUDA

// As factor_cpu and solve_cpu. After a bad pivot the work goes on with numbers of no meaning: ask `pivot` at the end.
// Throws std::runtime_error where CUDA or cuBLAS refuses a call.
void factor_cuda(const CudaCall& call);
void solve_cuda(const CudaCall& call, Place right, int64_t count);

#endif

}  // namespace minisp
