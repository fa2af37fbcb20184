// Products of float32 matrices with the level's vectors.
//
// A block of kRows rows and two vectors of columns of C stays in registers: per step along the depth, 2 loads of B and
// kRows broadcasts of A feed 2 kRows multiply-adds, so that both arithmetic units are busy where two loads a cycle are.
#pragma once

#include "operands.h"

namespace minisp::MINISP_LEVEL {

struct FloatEngine {
  using Element = float;
  static constexpr int64_t kEdge = 2 * kLanes, kDepth = kEdge, kTile = kDepth * kEdge, kMultiple = kEdge;
  // 16 vector registers hold 12 sums, 2 of B and 1 of A; AVX-512 and NEON have 32.
  static constexpr int64_t kRows = MINISP_NUMBER >= MINISP_NUMBER_avx512 ? 8 : 6;
  static constexpr int64_t kColumns = kEdge;
  // Of the Gram matrix: a multiple of kRows and kColumns; two packed strips of 256 tokens are 200 KB.
  static constexpr int64_t kGramEdge = 96, kGramChunk = 256;
  static constexpr int kDegree = 6;

  struct Scope {};

  template <typename T>
  MINISP_INLINE static void load_tile(const T* matrix, int64_t stride, float* tile) {
    for (int64_t k = 0; k < kDepth; ++k)
      for (int64_t lane = 0; lane < kEdge; lane += kLanes)
        store_vector(load_vector(matrix + k * stride + lane), tile + k * kEdge + lane);
  }

  // Where row `key`, columns from `query` on, stand in a matrix of kBlock columns that is kept as tiles.
  MINISP_INLINE static float* place(float* tiles, int64_t key, int64_t query, int64_t columns) {
    return tiles + (key / kDepth * (columns / kEdge) + query / kEdge) * kTile + key % kDepth * kEdge + query % kEdge;
  }

  // Two consecutive rows, `key` even, into tiles.
  MINISP_INLINE static void store_tiled(Floats even, Floats odd, float* tiles, int64_t key, int64_t query,
                                        int64_t columns) {
    float* const at = place(tiles, key, query, columns);
    store_vector(even, at);
    store_vector(odd, at + kEdge);
  }

  template <int64_t rows>
  MINISP_INLINE static void multiply_rows(Sums c, Rows<float> a, Tiles<float> b, int64_t depth, bool add) {
    Floats sum[rows][2] = {};
    for (int64_t k = 0; k < depth; k += kDepth, a.data += a.step, b.data += b.step)
      for (int64_t inner = 0; inner < kDepth; ++inner) {
        const Floats left = load_vector(b.data + inner * kEdge), right = load_vector(b.data + inner * kEdge + kLanes);
        unrolled<rows>([&](int64_t r) MINISP_LAMBDA {
          const Floats factor = spread(a.data[r * a.stride + inner]);
          sum[r][0] += factor * left;
          sum[r][1] += factor * right;
        });
      }
    unrolled<rows>([&](int64_t r) MINISP_LAMBDA {
      float* const to = c.data + r * c.stride;
      store_vector(add ? load_vector(to) + sum[r][0] : sum[r][0], to);
      store_vector(add ? load_vector(to + kLanes) + sum[r][1] : sum[r][1], to + kLanes);
    });
  }

  // A tile column of B stays in the first-level cache for all rows of A.
  static void multiply(Sums c, Rows<float> a, Tiles<float> b, Extent extent, bool add) {
    for (int64_t column = 0; column < extent.columns; column += kEdge, b.data += kTile) {
      int64_t row = 0;
      for (; row + kRows <= extent.rows; row += kRows)
        multiply_rows<kRows>(c.from(row, column), a.from(row), b, extent.depth, add);
      for (; row + 4 <= extent.rows; row += 4)
        multiply_rows<4>(c.from(row, column), a.from(row), b, extent.depth, add);
      for (; row < extent.rows; row += 2)
        multiply_rows<2>(c.from(row, column), a.from(row), b, extent.depth, add);
    }
  }
};

}  // namespace minisp::MINISP_LEVEL
