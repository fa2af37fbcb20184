// The Cholesky solver on a CUDA device, over the cuBLAS that the process has loaded.
//
// Everything is queued on the caller's stream; nothing waits and nothing is allocated.
#pragma once

#include <cstdint>

#include "cholesky_cpu.h"

namespace minisp {

struct CudaCall {
  CholeskyCall call;   // matrix on the device, or, when streamed, on the host, pinned or not; workspace on the device;
                       // gemm is the address of cublasSgemm_v2 or cublasDgemm_v2
  void* handle;        // cublasHandle_t, which must use `stream`
  void* stream;        // cudaStream_t
  int64_t* pivot;      // on the device, 0 at first; becomes the number of the first bad pivot, counted from 1
};

#ifdef MINISP_WITH_CUDA

int64_t workspace_cuda(int64_t size, bool is_double, int64_t streamed_columns);

// As factor_cpu and solve_cpu. After a bad pivot the work goes on with numbers of no meaning: ask `pivot` at the end.
// Throws std::runtime_error where CUDA or cuBLAS refuses a call.
void factor_cuda(const CudaCall& call);
void solve_cuda(const CudaCall& call, Place right, int64_t count);

#endif

}  // namespace minisp
