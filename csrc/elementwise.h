// The element-wise passes of the saliency sweep on a CPU, each one pass over memory; formulas in minisp/ops/reference.py.
//
// All matrices are contiguous and row-major. `is_bf16` says whether elements are bfloat16 or float32; arithmetic is
// float32 either way, with one rounding at the end. Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "shapes.h"

namespace minisp {

// In place: gate <- dL/dgate, up <- dL/dup (may be null), grad_x <- x. Adds to sums (3, m): |p|, p^2, p, summed over
// the tokens, with p = x * grad_x.
void activation_backward(void* gate, void* up, void* grad_x, float* sums, Matrix shape, Activation kind,
                         int num_threads);

// gradient <- softmax(logits) - onehot(targets), which may be the logits' own memory; returns the summed negative log
// likelihood in nats.
double cross_entropy(const void* logits, const int64_t* targets, void* gradient, Matrix shape, int num_threads);

}  // namespace minisp
