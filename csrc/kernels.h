// The functions that are compiled for every processor level: each works on a part of an operation in one thread.
#pragma once

#include <cstdint>

#include "shapes.h"

namespace minisp {

// The Gram matrix from inputs of one type. An input is packed, `chunk` tokens at a time, in strips of `edge` units; then
// blocks of `edge` x `edge` of G are added to.
struct GramKernels {
  int64_t edge, chunk;
  // Bytes of a packed strip for each of the two operands of the product.
  int64_t (*strip_bytes)(int64_t num_tokens);
  // Strip number `strip` of x (num_tokens, width), of which x is the first row, goes to `rows` and `tiles`.
  void (*pack)(const void* x, int64_t num_tokens, int64_t width, int64_t strip, void* rows, void* tiles);
  // Adds to blocks first .. last - 1 of G. Block (i, j), j <= i, is number i (i + 1) / 2 + j.
  void (*update)(float* gram, int64_t width, const void* rows, const void* tiles, int64_t num_tokens, int64_t first,
                 int64_t last);
};

// Attention on heads of one type; formulas in attention.h. A task is one query head of one batch element; the padded
// extent of a head is in `padded`.
struct AttentionKernels {
  HeadExtent (*padded)(const AttentionShape& shape);
  void (*forward)(const AttentionInputs& inputs, Heads out, float* logsumexp, const AttentionShape& shape,
                  int64_t first, int64_t last);
  // The gradient of the queries, and of keys and values what each query head contributes: sums (tasks, padded).
  void (*backward)(const AttentionRecord& record, Heads grad_query, float* key_sums, float* value_sums,
                   const AttentionShape& shape, int64_t first, int64_t last);
  // Tasks are key heads here: the contributions of their query heads, added and rounded once.
  void (*add_groups)(const float* sums, Heads gradient, const AttentionShape& shape, int64_t first, int64_t last);
};

// Of two members of a kind, the first is for float32 and the second for bfloat16: index with `is_bf16`.
struct Kernels {
  // Columns [first, first + count) of the passes in elementwise.h; count is at most kElementwiseColumns.
  void (*activation_backward)(void* gate, void* up, void* grad_x, float* sums, const Matrix& shape, Activation kind,
                              int64_t first, int64_t count);
  // One row; `buffer` holds a row of float32.
  double (*cross_entropy)(const void* logits, int64_t target, void* gradient, float* buffer, const Matrix& shape);
  // Rows first .. last - 1 of norms.h; `scale` is offset + w in float32. Tokens first .. last - 1 of all windows.
  void (*norm_rows)(const void* hidden, const float* scale, float eps, void* out, float* inverse,
                    const NormShape& shape, int64_t first, int64_t last);
  void (*norm_backward_rows)(const void* grad, const void* hidden, const float* scale, const float* inverse, void* out,
                             const NormShape& shape, int64_t first, int64_t last);
  void (*rotate_tokens)(const Rotated& query, const Rotated& key, const Angles& cosine, const Angles& sine,
                        const RotaryShape& shape, int64_t first, int64_t last);
  // Elimination of a diagonal block whose rows are `stride` elements apart; see levels/eliminate.cpp.
  int64_t (*eliminate_float)(float* block, int64_t stride, int64_t size);
  int64_t (*eliminate_double)(double* block, int64_t stride, int64_t size);
  const GramKernels* gram[2];
  const AttentionKernels* attention[2];
};

}  // namespace minisp
