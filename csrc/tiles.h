// The processor's bfloat16 matrix tiles (Intel AMX): C (16, 16) float32 += A (16, 32) B (32, 16).
//
// A is stored row by row, its rows anywhere. B is stored with its rows in pairs: 16 rows of 16 columns of 2 consecutive
// elements of one column, 1 KB in all. Where there are no tiles, `tiles_available` is false and nothing else is called.
#pragma once

#include <cstdint>

#include "numeric.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && (__GNUC__ >= 11 || defined(__clang__))
#define MINISP_AMX 1
#include <immintrin.h>
#define MINISP_TILES __attribute__((target("amx-tile,amx-bf16")))
#endif

namespace minisp {

constexpr int64_t kTileEdge = 16;                  // rows of A and C, columns of B and C
constexpr int64_t kTileDepth = 32;                 // columns of A, rows of B
constexpr int64_t kTile = kTileEdge * kTileDepth;  // elements of a bfloat16 tile
constexpr int64_t kPairs = kTile / 2;              // 32-bit pairs in one
constexpr int64_t kTileBytes = 64;                 // of a row of a tile that is stored densely

// The processor has the tiles and the operating system lets this process use them.
bool tiles_available();

// This thread's eight tile registers are 16 rows of 64 bytes each, until they are released.
void configure_tiles();
void release_tiles();

// Configured for the length of a block.
struct TileScope {
  TileScope() { configure_tiles(); }
  ~TileScope() { release_tiles(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// Operands of a product of tiles.
struct RowOrder {
  const bf16* data;
  int64_t stride;
};
struct PairOrder {
  const bf16* tiles;
  int64_t step;  // tiles from one 32 rows to the next
};
struct Sums {
  float* data;
  int64_t stride;
};
struct Extent {
  int64_t rows, columns, depth;  // multiples of 32
};

// Two tiles of an operand side by side: rows of A tiles are `row_bytes` apart, tiles `step` elements along the depth.
struct TilePair {
  const bf16 *first, *second;
  int64_t row_bytes, step;
};

// A 32 x 32 block: C (+)= the `steps` tile products of two rows of A tiles and two columns of B tiles; in a TileScope.
void multiply_block(Sums c, TilePair a, TilePair b, int64_t steps, bool add);

// C (+)= A B, 32 x 32 of C at a time; within a TileScope.
void multiply(Sums c, RowOrder a, PairOrder b, Extent extent, bool add);

struct MatrixSize {
  int64_t rows, columns;  // multiples of 32
};

// Paired order of a matrix: (rows / 32, columns / 16) tiles.
void pair_rows(const bf16* matrix, MatrixSize size, bf16* out);

// Paired order of its transpose: (columns / 32, rows / 16) tiles.
void pair_columns(const bf16* matrix, MatrixSize size, bf16* out);

// Row order of its transpose.
void transpose(const bf16* matrix, MatrixSize size, bf16* out);

}  // namespace minisp
