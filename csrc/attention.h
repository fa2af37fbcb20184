// Causal attention on a CPU with matrix tiles, forward and backward; formulas in minisp/reference.py.
//
// The scores of a block of 64 keys and 64 queries are made, used and forgotten, as in FlashAttention (Dao et al.,
// 2022): memory grows with the tokens, not with their square. bfloat16 products, float32 sums.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace minisp {

struct AttentionShape {
  int64_t batch, heads, kv_heads, tokens, dim;  // heads is a multiple of kv_heads
  float scale;
};

// A (batch, heads, tokens, dim) tensor whose last dimension is contiguous; strides in elements.
struct Heads {
  bf16* data;
  int64_t batch_stride, head_stride, token_stride;

  bf16* at(int64_t batch, int64_t head) const { return data + batch * batch_stride + head * head_stride; }
};

// out <- softmax(scale * Q K^T, causal) V; logsumexp (batch, heads, tokens) <- that of each row of scores.
void attention_forward(Heads query, Heads key, Heads value, Heads out, float* logsumexp, AttentionShape shape,
                       int num_threads);

// What the backward reads: the forward's inputs and results, and the gradient at its output.
struct AttentionRecord {
  Heads query, key, value, out, grad_out;
  const float* logsumexp;
};

// The gradients of query, key and value. Workspace beside some blocks per thread: 8 bytes per element of `out`.
void attention_backward(const AttentionRecord& record, Heads grad_query, Heads grad_key, Heads grad_value,
                        AttentionShape shape, int num_threads);

}  // namespace minisp
