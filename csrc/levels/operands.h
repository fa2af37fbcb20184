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
      for (int64_t k = 0; k < kDepthWords; ++k)
        for (int64_t lane = 0; lane < E::kEdge; ++lane) tile[k * E::kEdge + lane] = source[(t + lane) * stride + d + k];
}

// The transposes, one after the other, of each `part` rows of a matrix.
template <typename T>
void transpose_parts(const T* matrix, MatrixSize size, int64_t part, T* out) {
  constexpr int64_t kSide = 16;
  for (int64_t first = 0; first < size.rows; first += part)
    for (int64_t block = first; block < first + part; block += kSide)
      for (int64_t d = 0; d < size.columns; ++d)
        for (int64_t t = block; t < block + kSide; ++t)
          out[first * size.columns + d * part + t - first] = matrix[t * size.columns + d];
}

}  // namespace minisp::MINISP_LEVEL
