// What the CUDA solver would launch, counted on any machine: the algorithm of cholesky.h over a backend that only counts.
#pragma once

#include <cstdint>

namespace minisp {

struct CholeskyCount {
  int64_t products = 0;    // matrix products
  int64_t inversions = 0;  // blocks factored and inverted
  int64_t copies = 0;      // kernels that only move data or part it in pieces
  double flops = 0;        // of the products that are not large
  double large_flops = 0;  // of those that are
};

// One factorisation of A (size, size), and one solution for `count` right-hand sides where count > 0;
// with `pieces`, float32 products as CudaCall says.
CholeskyCount count_cuda(int64_t size, int64_t count, bool is_double, bool pieces);

}  // namespace minisp
