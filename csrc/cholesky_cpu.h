// The Cholesky solver on the CPU, over a BLAS that the process has loaded.
#pragma once

#include <cstdint>

#include "cholesky.h"

namespace minisp {

// Bytes of workspace: independent of the size where A is worked on in place.
int64_t workspace_cpu(int64_t size, bool is_double, int64_t streamed_columns);

// Factors A in place as cholesky.h says. Returns 0, or the number, counted from 1, of the first pivot that is not
// positive and finite.
int64_t factor_cpu(const CholeskyCall& call);

// R (count, size) <- R A^-1 in place, from the factor.
void solve_cpu(const CholeskyCall& call, Place right, int64_t count);

}  // namespace minisp
