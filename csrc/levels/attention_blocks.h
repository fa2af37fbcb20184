// The element-wise passes of attention on one block of scores, and what leaves a block.
//
// Scores are kept transposed, keys by queries: then their gradient is, row by row, an operand of dK and dV as it is, and
// as tiles it is one of O^T and dQ^T.
#pragma once

#include "engines.h"

namespace minisp::MINISP_LEVEL {

constexpr int64_t kBlock = 64;  // keys and queries of one block of scores
constexpr int64_t kArea = kBlock * kBlock;

// One block, all matrices (keys, queries): scores Q K^T, the gradient of the probabilities, and what follows from them.
template <typename E>
struct ScoreBlock {
  alignas(64) float scores[kArea];
  alignas(64) float grad[kArea];
  alignas(64) typename E::Element probability[kArea];
  alignas(64) typename E::Element grad_scores[kArea];
  alignas(64) typename E::Element tiled[kArea];  // the last one written, as tiles

  Tiles<typename E::Element> tiles() const { return {tiled, kBlock / E::kEdge * E::kTile}; }
};

// Running softmax of 64 queries (Milakov & Gimelshein, 2018): largest score so far, sum of exponentials relative to it,
// and what earlier results are to be multiplied by after the last block.
struct Running {
  alignas(64) float largest[kBlock], sum[kBlock], factor[kBlock];
};

// Which of the queries q, q + 1, ... see a key: on the diagonal, those from the key's own on.
MINISP_INLINE Ints visible(bool diagonal, int64_t key, int64_t q) { return from_lane(q, diagonal ? key : -1); }

// Scores become probabilities in `tiled`, relative to the largest score of each query so far.
template <typename E>
void softmax_block(ScoreBlock<E>& block, float scale, bool diagonal, Running& running) {
  for (int64_t q = 0; q < kBlock; q += kLanes) {
    const Floats before = load_vector(running.largest + q);
    Floats top = before;
    for (int64_t key = 0; key < kBlock; ++key) {
      const Floats score = load_vector(block.scores + key * kBlock + q) * scale;
      top = (score > top) & visible(diagonal, key, q) ? score : top;
    }
    Floats total = {};
    const auto probability = [&](int64_t key) MINISP_LAMBDA {
      const Floats score = load_vector(block.scores + key * kBlock + q);
      return where(visible(diagonal, key, q), exponential<E::kDegree>(score * scale - top));
    };
    for (int64_t key = 0; key < kBlock; key += 2) {
      const Floats even = probability(key), odd = probability(key + 1);
      total += even + odd;
      E::store_tiled(even, odd, block.tiled, key, q, kBlock);
    }
    const Floats shrink = exponential<E::kDegree>(before - top);
    store_vector(shrink, running.factor + q);
    store_vector(load_vector(running.sum + q) * shrink + total, running.sum + q);
    store_vector(top, running.largest + q);
  }
}

struct QueryRows {
  const float* logsumexp;
  const float* delta;  // sum of grad_out * out over the dimensions
};

// P = exp(scale S - logsumexp) and dS = scale P (dP - delta), the latter in `tiled` too.
template <typename E>
void score_gradient(ScoreBlock<E>& block, QueryRows queries, float scale, bool diagonal) {
  for (int64_t q = 0; q < kBlock; q += kLanes) {
    const Floats logsumexp = load_vector(queries.logsumexp + q), delta = load_vector(queries.delta + q);
    const auto gradient = [&](int64_t key) MINISP_LAMBDA {
      const int64_t place = key * kBlock + q;
      const Floats exponent = load_vector(block.scores + place) * scale - logsumexp;
      const Floats p = where(visible(diagonal, key, q), exponential<E::kDegree>(exponent));
      const Floats result = p * scale * (load_vector(block.grad + place) - delta);
      store_vector(p, block.probability + place);
      store_vector(result, block.grad_scores + place);
      return result;
    };
    for (int64_t key = 0; key < kBlock; key += 2) {
      const Floats even = gradient(key), odd = gradient(key + 1);
      E::store_tiled(even, odd, block.tiled, key, q, kBlock);
    }
  }
}

// matrix (rows, 64 queries): every column times its factor.
MINISP_INLINE void scale_columns(float* matrix, int64_t rows, const float* factor) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t q = 0; q < kBlock; q += kLanes)
      store_vector(load_vector(matrix + row * kBlock + q) * load_vector(factor + q), matrix + row * kBlock + q);
}

// rows (queries, dim) <- transpose of (dim padded to an even number, 64 queries); at most 512 dimensions.
MINISP_INLINE void store_queries(const float* transposed, int64_t queries, int64_t dim, float* rows, int64_t stride) {
  for (int64_t q = 0; q < queries; ++q)
    for (int64_t d = 0; d < dim; ++d) rows[q * stride + d] = transposed[d * kBlock + q];
}

MINISP_INLINE void store_queries(const float* transposed, int64_t queries, int64_t dim, bf16* rows, int64_t stride) {
  constexpr int64_t kMost = 512;
  uint32_t pairs[kMost / 2 * kBlock];
  for (int64_t d = 0; d < dim; d += 2)
    for (int64_t q = 0; q < kBlock; q += kLanes) {
      const float* const even = transposed + d * kBlock + q;
      store_words(pair(load_vector(even), load_vector(even + kBlock)), pairs + d / 2 * kBlock + q);
    }
  for (int64_t q = 0; q < queries; ++q) {
    for (int64_t d = 0; d + 2 <= dim; d += 2) std::memcpy(rows + q * stride + d, pairs + d / 2 * kBlock + q, 4);
    if (dim % 2) std::memcpy(rows + q * stride + dim - 1, pairs + dim / 2 * kBlock + q, 2);
  }
}

// delta (rows,) <- the sum of out * grad over the columns.
template <typename Element>
void dot_rows(const Element* out, const Element* grad, MatrixSize size, float* delta) {
  for (int64_t t = 0; t < size.rows; ++t) {
    Floats sum = {};
    for (int64_t i = t * size.columns; i < (t + 1) * size.columns; i += kLanes)
      sum += load_vector(out + i) * load_vector(grad + i);
    float total = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) total += sum[lane];
    delta[t] = total;
  }
}

// row (dim,) <- the sum of `count` rows that are `stride` apart and padded to whole vectors.
template <typename T>
void add_rows(const float* rows, int64_t count, int64_t stride, int64_t dim, T* row) {
  for (int64_t first = 0; first < dim; first += kLanes) {
    Floats sum = {};
    for (int64_t i = 0; i < count; ++i) sum += load_vector(rows + i * stride + first);
    T narrowed[kLanes];
    store_vector(sum, narrowed);
    std::memcpy(row + first, narrowed, smaller(dim - first, kLanes) * sizeof(T));
  }
}

// Whether every element of a row is finite: its exponent is not all ones.
MINISP_INLINE bool finite_row(const bf16* row, int64_t dim) {
  bool finite = true;
  for (int64_t d = 0; d < dim; ++d) finite &= (row[d] & 0x7f80u) != 0x7f80u;
  return finite;
}

MINISP_INLINE bool finite_row(const float* row, int64_t dim) {
  bool finite = true;
  for (int64_t d = 0; d < dim; ++d) finite &= is_finite(row[d]);
  return finite;
}

}  // namespace minisp::MINISP_LEVEL
