// The element-wise passes of attention on one block of scores, and what leaves a block.
//
// Scores are kept transposed, keys by queries: then their gradient is the row-ordered operand of dK and dV as it is, and
// one interleaving of its rows makes it the paired operand of O^T and dQ^T. Only where there are matrix tiles.
#pragma once

#include <cstdint>

#include "tiles.h"

namespace minisp {

constexpr int64_t kBlock = 64;  // keys and queries of one block of scores
constexpr int64_t kArea = kBlock * kBlock;

// One block, all matrices (keys, queries): scores Q K^T, the gradient of the probabilities, and what follows from them.
struct ScoreBlock {
  alignas(64) float scores[kArea];
  alignas(64) float grad[kArea];
  alignas(64) bf16 probability[kArea];
  alignas(64) bf16 grad_scores[kArea];
  alignas(64) uint32_t pairs[kArea / 2];  // of the last one written, in paired order

  PairOrder pair_order() const { return {reinterpret_cast<const bf16*>(pairs), kBlock / kTileEdge}; }
};

// Running softmax of 64 queries (Milakov & Gimelshein, 2018): largest score so far, sum of exponentials relative to it,
// and what earlier results are to be multiplied by after the last block.
struct Running {
  alignas(64) float largest[kBlock], sum[kBlock], factor[kBlock];
};

// Scores become probabilities in `pairs`, relative to the largest score of each query so far. On the diagonal, a query
// sees the keys up to itself.
void softmax_block(ScoreBlock& block, float scale, bool diagonal, Running& running);

struct QueryRows {
  const float* logsumexp;
  const float* delta;  // sum of grad_out * out over the dimensions
};

// P = exp(scale S - logsumexp) and dS = scale P (dP - delta), the latter in `pairs` too.
void score_gradient(ScoreBlock& block, QueryRows queries, float scale, bool diagonal);

// matrix (rows, 64 queries): every column times its factor.
void scale_columns(float* matrix, int64_t rows, const float* factor);

struct QueryExtent {
  int64_t queries, dim;
};

// rows (queries, dim) <- transpose of (dim padded to 32, 64 queries); at most 512 dimensions.
void store_queries(const float* transposed, QueryExtent extent, bf16* rows, int64_t stride);

// delta (rows,) <- the sum of out * grad over the columns.
void dot_rows(const bf16* out, const bf16* grad, MatrixSize size, float* delta);

// row (dim,) <- the sum of `count` rows that are `stride` apart.
void add_rows(const float* rows, int64_t count, int64_t stride, int64_t dim, bf16* row);

}  // namespace minisp
