// RMSNorm and the rotary embedding on a CPU, forward and backward, each one pass over memory; formulas in
// minisp/ops/reference.py.
//
// Elements are bfloat16 or float32, as `is_bf16` says; arithmetic is float32 either way, with one rounding at the end.
// Results do not depend on the number of threads.
//
// Floor per hidden element, in elements moved to or from memory: norm forward 2 (x, y) and backward 3 (x, dy, dx);
// rotary 2 (in, out) either way. A processor that reads a line before it writes it moves one more each. The second
// reading of a row, and weights, cosines and sines, come from the caches.
#pragma once

#include <cstdint>

#include "shapes.h"

namespace minisp {

// out (T, d) <- x r (offset + w), and inverse (T) <- r = (mean(x^2) + eps)^(-1/2).
void rms_norm(const void* hidden, const void* weight, float eps, void* out, float* inverse, NormShape shape,
              int num_threads);

// grad_hidden (T, d) <- r (h - x r^2 mean(h x)), h = grad (offset + w).
void rms_norm_backward(const void* grad, const void* hidden, const void* weight, const float* inverse,
                       void* grad_hidden, NormShape shape, int num_threads);

// Queries and keys, rotated by their angles, or, backward, by the transpose of that rotation.
void rotate(const Rotated& query, const Rotated& key, Angles cosine, Angles sine, RotaryShape shape, int num_threads);

}  // namespace minisp
