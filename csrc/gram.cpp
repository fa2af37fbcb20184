#include "gram.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "clones.h"
#include "parallel.h"
#include "tiles.h"

namespace minisp {

#ifdef MINISP_AMX

namespace {

constexpr int64_t kEdge = kTileEdge;
constexpr int64_t kBlock = 32;  // edge of the block of G that one thread keeps in four tiles
constexpr int64_t kTokens = kTileDepth;  // tokens of one tile product

// A tile product is C += A B with A (16 units, 32 tokens) row by row and B (32 tokens, 16 units) with tokens in pairs.
// Seen as 32-bit pairs of tokens, B is the transpose of A. One tile of X is stored in both orders; units or tokens
// beyond the edge are zero.
MINISP_CLONES void pack(const uint16_t* x, int64_t num_tokens, int64_t width, int64_t unit, int64_t token, uint16_t* a,
                        uint16_t* b) {
  const int64_t tokens = std::min(kTokens, num_tokens - token);
  const int64_t units = std::min(kEdge, width - unit);
  if (tokens < kTokens || units < kEdge) {
    std::memset(b, 0, sizeof(uint16_t) * kTile);
  }
  uint32_t* pairs = reinterpret_cast<uint32_t*>(b);
  uint32_t* rows = reinterpret_cast<uint32_t*>(a);
  if (tokens == kTokens && units == kEdge) {
    for (int64_t k = 0; k < kTokens / 2; ++k) {
      const uint16_t* even = x + (token + 2 * k) * width + unit;
      const uint16_t* odd = even + width;
      for (int64_t u = 0; u < kEdge; ++u) pairs[k * kEdge + u] = even[u] | static_cast<uint32_t>(odd[u]) << 16;
    }
  } else {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t u = 0; u < units; ++u) b[(t / 2 * kEdge + u) * 2 + t % 2] = x[(token + t) * width + unit + u];
  }
  for (int64_t u = 0; u < kEdge; ++u)
    for (int64_t k = 0; k < kTokens / 2; ++k) rows[u * kEdge + k] = pairs[k * kEdge + u];
}

// Adds the product for block (i, j) into G, through a dense copy of the block so that edges need no special case.
void update_block(float* gram, int64_t width, int64_t i, int64_t j, const uint16_t* a, const uint16_t* b,
                  int64_t steps) {
  alignas(64) float block[kBlock * kBlock];
  const int64_t rows = std::min(kBlock, width - i * kBlock), columns = std::min(kBlock, width - j * kBlock);
  float* corner = gram + i * kBlock * width + j * kBlock;
  for (int64_t r = 0; r < rows; ++r) std::memcpy(block + r * kBlock, corner + r * width, columns * sizeof(float));
  const int64_t strip = steps * kTile;
  // Rows from the packed A tiles of two strips of units, columns from the B tiles of two others.
  multiply_block({block, kBlock}, {a + 2 * i * strip, a + (2 * i + 1) * strip, kTileBytes, kTile},
                 {b + 2 * j * strip, b + (2 * j + 1) * strip, kTileBytes, kTile}, steps, true);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(corner + r * width, block + r * kBlock, columns * sizeof(float));
}

}  // namespace

void gram_update(float* gram, const uint16_t* x, int64_t num_tokens, int64_t width, int num_threads) {
  const int64_t blocks = (width + kBlock - 1) / kBlock, strips = 2 * blocks;
  const int64_t steps = (num_tokens + kTokens - 1) / kTokens;
  const int64_t elements = strips * steps * kTile;
  const std::unique_ptr<uint32_t[]> packed(new uint32_t[elements]);
  uint16_t* const a = reinterpret_cast<uint16_t*>(packed.get());
  uint16_t* const b = a + elements;
  parallel_for(strips, 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip)
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t offset = (strip * steps + step) * kTile;
        pack(x, num_tokens, width, std::min(strip * kEdge, width), step * kTokens, a + offset, b + offset);
      }
  });
  // Block (i, j), j <= i, is number i (i + 1) / 2 + j: equal parts of the triangle for every thread.
  parallel_for(blocks * (blocks + 1) / 2, 1, num_threads, [&](int64_t begin, int64_t end) {
    const TileScope scope;
    int64_t i = 0;
    while ((i + 1) * (i + 2) / 2 <= begin) ++i;
    for (int64_t number = begin, j = begin - i * (i + 1) / 2; number < end; ++number) {
      update_block(gram, width, i, j, a, b, steps);
      if (++j > i) {
        ++i;
        j = 0;
      }
    }
  });
}

#else

void gram_update(float*, const uint16_t*, int64_t, int64_t, int) {}

#endif

}  // namespace minisp
