// Products of bfloat16 matrices, sums in float32: with Intel's matrix tiles (AMX), or with AVX-512's `vdpbf16ps`.
//
// Both add up products of pairs along the depth. A tile of B holds its 32 rows in pairs: 16 rows of 16 columns of 2
// consecutive elements of one column, 1 KB in all. A is in row order. A block of 32 rows and columns of C is made at once.
#pragma once

#include "operands.h"

#if MINISP_NUMBER >= MINISP_NUMBER_avx512_bf16

namespace minisp::MINISP_LEVEL {

#if MINISP_NUMBER == MINISP_NUMBER_amx

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// This thread's eight tile registers are 16 rows of 64 bytes each, for the length of a block.
struct TileScope {
  TileScope() {
    // Static: gcc's intrinsic tells the optimiser of the first 8 bytes alone, and stores into a local would be dropped.
    static constexpr TileConfig kConfig;
    _tile_loadconfig(&kConfig);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

#else

struct TileScope {};

#endif

struct PairEngine {
  using Element = bf16;
  static constexpr int64_t kEdge = 16, kDepth = 32, kTile = kDepth * kEdge, kMultiple = 32;
  static constexpr int64_t kRows = 32, kColumns = 32;
  static constexpr int64_t kGramEdge = 32;
#if MINISP_NUMBER == MINISP_NUMBER_amx
  static constexpr int64_t kGramChunk = 2048;
#else
  // 32 columns of so many tokens are 32 KB, which stay in the first-level cache for four blocks of rows.
  static constexpr int64_t kGramChunk = 512;
#endif
  static constexpr int kDegree = 5;

  using Scope = TileScope;

  MINISP_INLINE static void load_tile(const bf16* matrix, int64_t stride, bf16* tile) {
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(tile);
    for (int64_t k = 0; k < kDepth / 2; ++k) {
      const bf16* const even = matrix + 2 * k * stride;
      const bf16* const odd = even + stride;
      for (int64_t lane = 0; lane < kEdge; ++lane)
        pairs[k * kEdge + lane] = even[lane] | static_cast<uint32_t>(odd[lane]) << 16;
    }
  }

  // Two consecutive rows, `key` even, into tiles of a matrix of so many columns.
  MINISP_INLINE static void store_tiled(Floats even, Floats odd, bf16* tiles, int64_t key, int64_t query,
                                        int64_t columns) {
    bf16* const tile = tiles + (key / kDepth * (columns / kEdge) + query / kEdge) * kTile;
    store_words(pair(even, odd), reinterpret_cast<uint32_t*>(tile + key % kDepth * kEdge));
  }

  static void multiply(Sums c, Rows<bf16> a, Tiles<bf16> b, Extent extent, bool add) {
    for (int64_t row = 0; row < extent.rows; row += kRows)
      for (int64_t column = 0; column < extent.columns; column += kColumns)
        multiply_block(c.from(row, column), a.from(row), {b.data + column / kEdge * kTile, b.step}, extent.depth / kDepth,
                       add);
  }

#if MINISP_NUMBER == MINISP_NUMBER_amx

  // Four tiles of sums: every tile of A and B that is loaded is used twice.
  static void multiply_block(Sums c, Rows<bf16> a, Tiles<bf16> b, int64_t steps, bool add) {
    const int64_t c_bytes = c.stride * sizeof(float), a_bytes = a.stride * sizeof(bf16), b_bytes = 64;
    float* const lower = c.data + kEdge * c.stride;
    // gcc's tile loads do not say that they read memory: whatever was stored shall be there by now.
    __asm__ volatile("" ::: "memory");
    if (add) {
      _tile_loadd(0, c.data, c_bytes);
      _tile_loadd(1, c.data + kEdge, c_bytes);
      _tile_loadd(2, lower, c_bytes);
      _tile_loadd(3, lower + kEdge, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const bf16* second = a.data + kEdge * a.stride;
    for (int64_t step = 0; step < steps; ++step, a.data += a.step, second += a.step, b.data += b.step) {
      _tile_loadd(4, a.data, a_bytes);
      _tile_loadd(6, b.data, b_bytes);
      _tile_loadd(5, second, a_bytes);
      _tile_loadd(7, b.data + kTile, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c.data, c_bytes);
    _tile_stored(1, c.data + kEdge, c_bytes);
    _tile_stored(2, lower, c_bytes);
    _tile_stored(3, lower + kEdge, c_bytes);
  }

#else

  static constexpr int64_t kAtOnce = 8;  // rows: 16 registers of sums hide the latency, 32 registers hold all

  static void multiply_block(Sums c, Rows<bf16> a, Tiles<bf16> b, int64_t steps, bool add) {
    for (int64_t row = 0; row < kRows; row += kAtOnce) multiply_rows(c.from(row, 0), a.from(row), b, steps, add);
  }

  MINISP_INLINE static __m512bh words(Words values) { return reinterpret_cast<__m512bh>(values); }

  MINISP_INLINE static Words load_words(const bf16* place) {
    Words values;
    std::memcpy(&values, place, sizeof values);
    return values;
  }

  // The pair at `place`, in every lane.
  MINISP_INLINE static Words spread_pair(const bf16* place) {
    uint32_t value;
    std::memcpy(&value, place, sizeof value);
    return spread(value);
  }

  MINISP_INLINE static void multiply_rows(Sums c, Rows<bf16> a, Tiles<bf16> b, int64_t steps, bool add) {
    __m512 sum[kAtOnce][2];
    unrolled<kAtOnce>([&](int64_t r) MINISP_LAMBDA {
      const float* const from = c.data + r * c.stride;
      sum[r][0] = reinterpret_cast<__m512>(add ? load_vector(from) : Floats{});
      sum[r][1] = reinterpret_cast<__m512>(add ? load_vector(from + kLanes) : Floats{});
    });
    for (int64_t step = 0; step < steps; ++step, a.data += a.step, b.data += b.step)
      for (int64_t k = 0; k < kDepth; k += 2) {
        const __m512bh left = words(load_words(b.data + k * kEdge)), right = words(load_words(b.data + kTile + k * kEdge));
        unrolled<kAtOnce>([&](int64_t r) MINISP_LAMBDA {
          const __m512bh factor = words(spread_pair(a.data + r * a.stride + k));
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], factor, left);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], factor, right);
        });
      }
    unrolled<kAtOnce>([&](int64_t r) MINISP_LAMBDA {
      store_vector(reinterpret_cast<Floats>(sum[r][0]), c.data + r * c.stride);
      store_vector(reinterpret_cast<Floats>(sum[r][1]), c.data + r * c.stride + kLanes);
    });
  }

#endif
};

}  // namespace minisp::MINISP_LEVEL

#endif
