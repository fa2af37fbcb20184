// What one level offers, defined in the other files of this folder and gathered in table.cpp.
#pragma once

#include "../kernels.h"

namespace minisp::MINISP_LEVEL {

void activation_backward(void* gate, void* up, void* grad_x, float* sums, const Matrix& shape, Activation kind,
                         int64_t first, int64_t count);
double cross_entropy(const void* logits, int64_t target, void* gradient, float* buffer, const Matrix& shape);
void norm_rows(const void* hidden, const float* scale, float eps, void* out, float* inverse, const NormShape& shape,
               int64_t first, int64_t last);
void norm_backward_rows(const void* grad, const void* hidden, const float* scale, const float* inverse, void* out,
                        const NormShape& shape, int64_t first, int64_t last);
void rotate_tokens(const Rotated& query, const Rotated& key, const Angles& cosine, const Angles& sine,
                   const RotaryShape& shape, int64_t first, int64_t last);
int64_t eliminate_float(float* block, int64_t stride, int64_t size);
int64_t eliminate_double(double* block, int64_t stride, int64_t size);
extern const GramKernels gram_float, gram_bf16;
extern const AttentionKernels attention_float, attention_bf16;

}  // namespace minisp::MINISP_LEVEL
