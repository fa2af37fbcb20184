// The Cholesky solver on the CPU, over a BLAS that the process has loaded.
#pragma once

#include <cstdint>

#include "cholesky.h"

namespace minisp {

// In a call, gemm and large_gemm are addresses of Fortran's sgemm or dgemm with 32-bit integers. Panels are of 128
// columns, or, so that the schedule of a GPU can be tested, of kWidePanel.
// Factors A in place as cholesky.h says. Returns 0, or the number, counted from 1, of the first pivot that is not
// positive and finite.
int64_t factor_cpu(const CholeskyCall& call);

// R (count, size) <- R A^-1 in place, from the factor.
void solve_cpu(const CholeskyCall& call, Place right, int64_t count);

}  // namespace minisp
