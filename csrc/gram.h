// Streaming Gram matrix on a CPU with matrix tiles (Intel AMX): bfloat16 products, float32 sums.
#pragma once

#include <cstdint>

namespace minisp {

// gram (m, m) += X^T X on the 32 x 32 blocks that touch the lower triangle. X is (T, m) bfloat16, contiguous. The
// workspace of 4 * T * m bytes, T and m rounded up to 32, is the function's own.
void gram_update(float* gram, const uint16_t* x, int64_t num_tokens, int64_t width, int num_threads);

}  // namespace minisp
