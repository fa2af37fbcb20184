// Streaming Gram matrix on a CPU. Products of bfloat16 inputs are exact, sums are float32.
#pragma once

#include <cstdint>

#include "shapes.h"

namespace minisp {

// gram (m, m) += X^T X on the lower triangle; what stands above it becomes unspecified. X is (T, m). The workspace, at
// most 8 bytes per element of X and 16 KB per unit, is the function's own.
//
// Floor: T m^2 FLOPs at the processor's rate of products; the packing of X reads and writes 12 (float32) bytes per
// element once for m multiply-adds. G is read and written once per chunk of tokens: 8 bytes per 2 * chunk FLOPs.
void gram_update(float* gram, const void* x, Matrix shape, int num_threads);

}  // namespace minisp
