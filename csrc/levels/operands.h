// Operands of a product C (+)= A B on tiles, for the engines of this folder.
//
// An engine says what a tile of B is: kDepth rows and kEdge columns of Element. All extents are multiples of kMultiple.
#pragma once

#include "vectors.h"

namespace minisp::MINISP_LEVEL {

// A: row r, column k at data[r * stride + k / kDepth * step + k % kDepth].
template <typename T>
struct Rows {
  const T* data;
  int64_t stride, step;

  Rows from(int64_t row) const { return {data + row * stride, stride, step}; }
};

// B: tiles side by side; `step` elements from one kDepth rows to the next.
template <typename T>
struct Tiles {
  const T* data;
  int64_t step;
};

// C, row-major.
struct Sums {
  float* data;
  int64_t stride;

  Sums from(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};

struct Extent {
  int64_t rows, columns, depth;
};

// A row-major matrix in an engine's multiples.
struct MatrixSize {
  int64_t rows, columns;
};

// (size.rows / kDepth, size.columns / kEdge) tiles of a matrix.
template <typename E>
void tile_rows(const typename E::Element* matrix, MatrixSize size, typename E::Element* out) {
  for (int64_t t = 0; t < size.rows; t += E::kDepth)
    for (int64_t d = 0; d < size.columns; d += E::kEdge, out += E::kTile)
      E::load_tile(matrix + t * size.columns + d, size.columns, out);
}

// to (columns, rows) <- the transpose of from (rows, columns), through an array that nothing else can be, so that rows are
// written as vectors.
template <int64_t rows, int64_t columns, typename T>
MINISP_INLINE void transpose_block(const T* from, int64_t stride, T* to, int64_t to_stride) {
  T part[columns * rows];
  for (int64_t k = 0; k < columns; ++k)
    for (int64_t lane = 0; lane < rows; ++lane) part[k * rows + lane] = from[lane * stride + k];
  for (int64_t k = 0; k < columns; ++k) std::memcpy(to + k * to_stride, part + k * rows, rows * sizeof(T));
}

// (size.columns / kDepth, size.rows / kEdge) tiles of its transpose. Seen as 32-bit words along the depth, a tile is the
// plain transpose of its part of the matrix.
template <typename E>
void tile_columns(const typename E::Element* matrix, MatrixSize size, typename E::Element* out) {
  constexpr int64_t kPerWord = 4 / sizeof(typename E::Element), kDepthWords = E::kDepth / kPerWord;
  const uint32_t* const source = reinterpret_cast<const uint32_t*>(matrix);
  uint32_t* tile = reinterpret_cast<uint32_t*>(out);
  const int64_t stride = size.columns / kPerWord;
  for (int64_t d = 0; d < stride; d += kDepthWords)
    for (int64_t t = 0; t < size.rows; t += E::kEdge, tile += kDepthWords * E::kEdge)
      transpose_block<E::kEdge, kDepthWords>(source + t * stride + d, stride, tile, E::kEdge);
}

// The transposes, one after the other, of each `part` rows of a matrix.
template <int64_t part, typename T>
void transpose_parts(const T* matrix, MatrixSize size, T* out) {
  constexpr int64_t kSide = 8;
  for (int64_t first = 0; first < size.rows; first += part, out += part * size.columns)
    for (int64_t t = 0; t < part; t += kSide)
      for (int64_t d = 0; d < size.columns; d += kSide)
        transpose_block<kSide, kSide>(matrix + (first + t) * size.columns + d, size.columns, out + d * part + t, part);
}

}  // namespace minisp::MINISP_LEVEL
