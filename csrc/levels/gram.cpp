#include "engines.h"
#include "table.h"

namespace minisp::MINISP_LEVEL {

namespace {

// Packed strips: X^T as rows, a dense (kGramEdge, kDepth) matrix after the other, and X as tiles.
template <typename E>
int64_t strip_elements(int64_t num_tokens) {
  return E::kGramEdge * round_up(num_tokens, E::kDepth);
}

template <typename E>
int64_t strip_bytes(int64_t num_tokens) {
  return strip_elements<E>(num_tokens) * static_cast<int64_t>(sizeof(typename E::Element));
}

// One tile of X in both orders. Units or tokens beyond the edge are zero.
template <typename E, typename T>
MINISP_INLINE void pack_tile(const T* x, int64_t stride, MatrixSize present, typename E::Element* rows,
                             typename E::Element* tile) {
  constexpr int64_t kWords = E::kDepth * static_cast<int64_t>(sizeof(typename E::Element)) / 4;
  if (present.rows == E::kDepth && present.columns == E::kEdge) {
    E::load_tile(x, stride, tile);
  } else {
    T part[E::kTile] = {};
    for (int64_t t = 0; t < present.rows; ++t)
      for (int64_t u = 0; u < present.columns; ++u) part[t * E::kEdge + u] = x[t * stride + u];
    E::load_tile(part, E::kEdge, tile);
  }
  const uint32_t* const from = reinterpret_cast<const uint32_t*>(tile);
  uint32_t* const to = reinterpret_cast<uint32_t*>(rows);
  for (int64_t u = 0; u < E::kEdge; ++u)
    for (int64_t k = 0; k < kWords; ++k) to[u * kWords + k] = from[k * E::kEdge + u];
}

template <typename E, typename T>
void pack(const void* x, int64_t num_tokens, int64_t width, int64_t strip, void* rows, void* tiles) {
  using Element = typename E::Element;
  Element* row = static_cast<Element*>(rows) + strip * strip_elements<E>(num_tokens);
  Element* tile = static_cast<Element*>(tiles) + strip * strip_elements<E>(num_tokens);
  for (int64_t token = 0; token < num_tokens; token += E::kDepth)
    for (int64_t unit = strip * E::kGramEdge; unit < (strip + 1) * E::kGramEdge; unit += E::kEdge) {
      const int64_t units = larger(int64_t{0}, smaller(E::kEdge, width - unit));
      const T* const corner = static_cast<const T*>(x) + token * width + unit;
      pack_tile<E>(corner, width, {smaller(E::kDepth, num_tokens - token), units}, row, tile);
      row += E::kTile;
      tile += E::kTile;
    }
}

// Adds the product for block (i, j) to a whole block of C; of a block on the diagonal, only what touches the triangle.
template <typename E>
MINISP_INLINE void add_product(Sums c, const typename E::Element* left, const typename E::Element* right,
                               int64_t num_tokens, bool diagonal) {
  const Rows<typename E::Element> a{left, E::kDepth, E::kGramEdge * E::kDepth};
  for (int64_t column = 0; column < E::kGramEdge; column += E::kColumns) {
    const int64_t row = diagonal ? column / E::kRows * E::kRows : 0;
    E::multiply(c.from(row, column), a.from(row), {right + column / E::kEdge * E::kTile, E::kGramEdge * E::kDepth},
                {E::kGramEdge - row, E::kColumns, round_up(num_tokens, E::kDepth)}, true);
  }
}

template <typename E>
void update(float* gram, int64_t width, const void* rows, const void* tiles, int64_t num_tokens, int64_t first,
            int64_t last) {
  constexpr int64_t kEdge = E::kGramEdge;
  [[maybe_unused]] const typename E::Scope scope;
  alignas(64) float block[kEdge * kEdge];
  const int64_t strip = strip_elements<E>(num_tokens);
  int64_t i = 0;
  while ((i + 1) * (i + 2) / 2 <= first) ++i;
  for (int64_t number = first, j = first - i * (i + 1) / 2; number < last; ++number) {
    const auto* left = static_cast<const typename E::Element*>(rows) + i * strip;
    const auto* right = static_cast<const typename E::Element*>(tiles) + j * strip;
    float* const corner = gram + i * kEdge * width + j * kEdge;
    const int64_t present = smaller(kEdge, width - i * kEdge), columns = smaller(kEdge, width - j * kEdge);
    if (present == kEdge && columns == kEdge) {
      add_product<E>({corner, width}, left, right, num_tokens, i == j);
    } else {
      // Through a dense copy, so that edges need no special case.
      for (int64_t r = 0; r < present; ++r)
        std::memcpy(block + r * kEdge, corner + r * width, columns * sizeof(float));
      add_product<E>({block, kEdge}, left, right, num_tokens, i == j);
      for (int64_t r = 0; r < present; ++r)
        std::memcpy(corner + r * width, block + r * kEdge, columns * sizeof(float));
    }
    if (++j > i) {
      ++i;
      j = 0;
    }
  }
}

template <typename E, typename T>
constexpr GramKernels kernels_of() {
  return {E::kGramEdge, E::kGramChunk, &strip_bytes<E>, &pack<E, T>, &update<E>};
}

}  // namespace

const GramKernels gram_float = kernels_of<FloatEngine, float>();
const GramKernels gram_bf16 = kernels_of<NarrowEngine, bf16>();

}  // namespace minisp::MINISP_LEVEL
