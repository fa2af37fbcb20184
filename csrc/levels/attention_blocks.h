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

// Values of the queries q, q + 1, ... for a key, or 0 for those that do not see it: on the diagonal, a query sees the keys
// up to its own.
template <bool diagonal>
MINISP_INLINE Floats visible(Floats values, int64_t key, int64_t q) {
  if constexpr (diagonal) return where(from_lane(q, key), values);
  return values;
}

// Scores become probabilities in `tiled`, relative to the largest score of each query so far.
template <typename E, bool diagonal>
void softmax_block(ScoreBlock<E>& block, float scale, Running& running) {
  for (int64_t q = 0; q < kBlock; q += kLanes) {
    const Floats before = load_vector(running.largest + q);
    // Two chains of comparisons, each waiting for the one before.
    Floats tops[2] = {before, before};
    for (int64_t key = 0; key < (diagonal ? q + kLanes : kBlock); key += 2)
      unrolled<2>([&](int64_t i) MINISP_LAMBDA {
        const Floats score = load_vector(block.scores + (key + i) * kBlock + q) * scale;
        const Ints above = score > tops[i];
        tops[i] = (diagonal ? above & from_lane(q, key + i) : above) ? score : tops[i];
      });
    const Floats top = tops[0] > tops[1] ? tops[0] : tops[1];
    Floats total = {};
    const auto probability = [&](int64_t key) MINISP_LAMBDA {
      const Floats score = load_vector(block.scores + key * kBlock + q);
      return visible<diagonal>(exponential<E::kDegree>(score * scale - top), key, q);
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
template <typename E, bool diagonal>
void score_gradient(ScoreBlock<E>& block, QueryRows queries, float scale) {
  for (int64_t q = 0; q < kBlock; q += kLanes) {
    const Floats logsumexp = load_vector(queries.logsumexp + q), delta = load_vector(queries.delta + q);
    const auto gradient = [&](int64_t key) MINISP_LAMBDA {
      const int64_t place = key * kBlock + q;
      const Floats exponent = load_vector(block.scores + place) * scale - logsumexp;
      const Floats p = visible<diagonal>(exponential<E::kDegree>(exponent), key, q);
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

// rows (queries, columns) <- the transpose of words (columns, 64 queries).
MINISP_INLINE void store_words_turned(const uint32_t* words, int64_t queries, int64_t columns, char* rows,
                                      int64_t row_bytes) {
  constexpr int64_t kSide = 8;
  uint32_t part[kSide * kSide];
  for (int64_t q = 0; q < queries; q += kSide)
    for (int64_t d = 0; d < columns; d += kSide) {
      transpose_block<kSide, kSide>(words + d * kBlock + q, kBlock, part, kSide);
      const int64_t bytes = 4 * smaller(kSide, columns - d);
      for (int64_t i = 0; i < smaller(kSide, queries - q); ++i) {
        char* const to = rows + (q + i) * row_bytes + 4 * d;
        if (bytes == 4 * kSide) {
          std::memcpy(to, part + i * kSide, 4 * kSide);
        } else {
          std::memcpy(to, part + i * kSide, bytes);
        }
      }
    }
}

// rows (queries, dim) <- the transpose of (dim padded to 16, 64 queries); at most 512 dimensions.
MINISP_INLINE void store_queries(const float* transposed, int64_t queries, int64_t dim, float* rows, int64_t stride) {
  store_words_turned(reinterpret_cast<const uint32_t*>(transposed), queries, dim, reinterpret_cast<char*>(rows),
                     4 * stride);
}

MINISP_INLINE void store_queries(const float* transposed, int64_t queries, int64_t dim, bf16* rows, int64_t stride) {
  constexpr int64_t kMost = 512;
  uint32_t pairs[kMost / 2 * kBlock];
  for (int64_t d = 0; d < round_up(dim, 16); d += 2)
    for (int64_t q = 0; q < kBlock; q += kLanes) {
      const float* const even = transposed + d * kBlock + q;
      store_words(pair(load_vector(even), load_vector(even + kBlock)), pairs + d / 2 * kBlock + q);
    }
  store_words_turned(pairs, queries, dim / 2, reinterpret_cast<char*>(rows), 2 * stride);
  if (dim % 2)
    for (int64_t q = 0; q < queries; ++q) std::memcpy(rows + q * stride + dim - 1, pairs + dim / 2 * kBlock + q, 2);
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
