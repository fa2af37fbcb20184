#include "attention_blocks.h"

#include <algorithm>

#include "clones.h"

namespace minisp {

#ifdef MINISP_AMX

// Every processor with bfloat16 tiles has these vectors too; `tiles_available` asks for both.
#define MINISP_VECTORS __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
// gcc 12 warns of the intentionally undefined operands within its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define MINISP_VECTORS_INLINE MINISP_VECTORS inline __attribute__((always_inline))

namespace {

constexpr int64_t kLanes = 16;

// e^x, relative error below 3e-6, as `exponential` of numeric.h: for results that are rounded to bfloat16 (2^-9).
MINISP_VECTORS_INLINE __m512 exponential16(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-100.0f), x);  // in this order NaN stays NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.0f / 120.0f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Queries first .. first + 15 that see this key.
MINISP_VECTORS_INLINE __mmask16 visible(bool diagonal, int64_t key, int64_t first) {
  if (!diagonal || first >= key) return 0xffff;
  return key - first >= kLanes ? 0 : static_cast<__mmask16>(0xffff << (key - first));
}

// Two rows of sixteen values as one row of pairs.
MINISP_VECTORS_INLINE void store_pairs(__m512 even, __m512 odd, uint32_t* place) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
  _mm512_storeu_si512(place, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

MINISP_VECTORS_INLINE void store_row(__m512 values, bf16* place) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

// Where the pairs of keys `key`, `key + 1` and of sixteen queries stand in a block's paired order.
MINISP_VECTORS_INLINE uint32_t* pair_place(uint32_t* pairs, int64_t key, int64_t query) {
  const int64_t tile = key / kTileDepth * (kBlock / kTileEdge) + query / kTileEdge;
  return pairs + tile * kPairs + key % kTileDepth / 2 * kTileEdge;
}

}  // namespace

MINISP_VECTORS void softmax_block(ScoreBlock& block, float scale, bool diagonal, Running& running) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t q = 0; q < kBlock; q += kLanes) {
    const __m512 before = _mm512_load_ps(running.largest + q);
    __m512 top = before;
    for (int64_t key = 0; key < kBlock; ++key) {
      const __m512 score = _mm512_mul_ps(_mm512_load_ps(block.scores + key * kBlock + q), factor);
      top = _mm512_mask_max_ps(top, visible(diagonal, key, q), top, score);
    }
    __m512 total = _mm512_setzero_ps();
    const auto probability = [&](int64_t key) MINISP_VECTORS {
      const __m512 score = _mm512_load_ps(block.scores + key * kBlock + q);
      return _mm512_maskz_mov_ps(visible(diagonal, key, q), exponential16(_mm512_fmsub_ps(score, factor, top)));
    };
    for (int64_t key = 0; key < kBlock; key += 2) {
      const __m512 even = probability(key), odd = probability(key + 1);
      total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
      store_pairs(even, odd, pair_place(block.pairs, key, q));
    }
    const __m512 shrink = exponential16(_mm512_sub_ps(before, top));
    _mm512_store_ps(running.factor + q, shrink);
    _mm512_store_ps(running.sum + q, _mm512_fmadd_ps(_mm512_load_ps(running.sum + q), shrink, total));
    _mm512_store_ps(running.largest + q, top);
  }
}

MINISP_VECTORS void score_gradient(ScoreBlock& block, QueryRows queries, float scale, bool diagonal) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t q = 0; q < kBlock; q += kLanes) {
    const __m512 logsumexp = _mm512_loadu_ps(queries.logsumexp + q), delta = _mm512_loadu_ps(queries.delta + q);
    const auto gradient = [&](int64_t key) MINISP_VECTORS {
      const int64_t place = key * kBlock + q;
      const __m512 exponent = _mm512_fmsub_ps(_mm512_load_ps(block.scores + place), factor, logsumexp);
      const __m512 p = _mm512_maskz_mov_ps(visible(diagonal, key, q), exponential16(exponent));
      const __m512 offset = _mm512_sub_ps(_mm512_load_ps(block.grad + place), delta);
      const __m512 result = _mm512_mul_ps(_mm512_mul_ps(p, factor), offset);
      store_row(p, block.probability + place);
      store_row(result, block.grad_scores + place);
      return result;
    };
    for (int64_t key = 0; key < kBlock; key += 2) {
      const __m512 even = gradient(key), odd = gradient(key + 1);
      store_pairs(even, odd, pair_place(block.pairs, key, q));
    }
  }
}

MINISP_VECTORS void scale_columns(float* matrix, int64_t rows, const float* factor) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t q = 0; q < kBlock; ++q) matrix[row * kBlock + q] *= factor[q];
}

MINISP_VECTORS void store_queries(const float* transposed, QueryExtent extent, bf16* rows, int64_t stride) {
  constexpr int64_t kMost = 512;
  uint32_t pairs[kMost / 2 * kBlock];
  const int64_t half = (extent.dim + 1) / 2;
  for (int64_t k = 0; k < half; ++k)
    for (int64_t q = 0; q < kBlock; q += kLanes) {
      const float* even = transposed + 2 * k * kBlock + q;
      store_pairs(_mm512_loadu_ps(even), _mm512_loadu_ps(even + kBlock), pairs + k * kBlock + q);
    }
  const __m512i lanes = _mm512_mullo_epi32(_mm512_set1_epi32(kBlock), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  for (int64_t q = 0; q < extent.queries; ++q)
    for (int64_t k = 0; k < half; k += kLanes) {
      const __mmask16 present = half - k >= kLanes ? 0xffff : static_cast<__mmask16>((1 << (half - k)) - 1);
      const __m512i row = _mm512_mask_i32gather_epi32(lanes, present, lanes, pairs + k * kBlock + q, 4);
      const int64_t left = std::min(extent.dim - 2 * k, 2 * kLanes);
      const __mmask32 stored = left == 32 ? 0xffffffffu : (1u << left) - 1;
      _mm512_mask_storeu_epi16(rows + q * stride + 2 * k, stored, row);
    }
}

MINISP_VECTORS void dot_rows(const bf16* out, const bf16* grad, MatrixSize size, float* delta) {
  for (int64_t t = 0; t < size.rows; ++t) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = t * size.columns; i < (t + 1) * size.columns; i += 2 * kLanes) {
      const __m512i a = _mm512_loadu_si512(out + i), b = _mm512_loadu_si512(grad + i);
      sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    delta[t] = _mm512_reduce_add_ps(sum);
  }
}

MINISP_CLONES void add_rows(const float* rows, int64_t count, int64_t stride, int64_t dim, bf16* row) {
  for (int64_t first = 0; first < dim; first += kLanes) {
    const int64_t lanes = std::min(dim - first, kLanes);
    float sum[kLanes] = {};
    for (int64_t i = 0; i < count; ++i)
      for (int64_t lane = 0; lane < lanes; ++lane) sum[lane] += rows[i * stride + first + lane];
    for (int64_t lane = 0; lane < lanes; ++lane) store(sum[lane], row + first + lane);
  }
}

#endif

}  // namespace minisp
