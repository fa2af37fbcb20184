// Causal attention on a CPU, forward and backward; formulas in minisp/ops/reference.py.
//
// The scores of a block of 64 keys and 64 queries are made, used and forgotten, as in FlashAttention (Dao et al.,
// 2022): memory grows with the tokens, not with their square. Sums are float32. A query that is not finite spoils its
// own row alone; a key or value that is not finite, the rows from its token on.
//
// Floor per head, L tokens and D dimensions: forward 2 L^2 D FLOPs (two products over half of the square), backward
// 5 L^2 D; blocks on the diagonal are computed whole, which adds 64 / L. A share of 1 / D of that are exponentials.
#pragma once

#include <cstdint>

#include "shapes.h"

namespace minisp {

// out <- softmax(scale * Q K^T, causal) V; logsumexp (batch, heads, tokens) <- that of each row of scores.
void attention_forward(const AttentionInputs& inputs, Heads out, float* logsumexp, const AttentionShape& shape,
                       int num_threads);

// The gradients of query, key and value. Workspace beside some blocks per thread: 8 bytes per element of `out`.
void attention_backward(const AttentionRecord& record, Heads grad_query, Heads grad_key, Heads grad_value,
                        const AttentionShape& shape, int num_threads);

}  // namespace minisp
