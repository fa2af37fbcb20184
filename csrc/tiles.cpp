#include "tiles.h"

#include "clones.h"

#ifdef MINISP_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace minisp {

#ifdef MINISP_AMX

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};



}  // namespace

bool tiles_available() {
  // Linux grants the tile registers' large state on request (Documentation/arch/x86/xstate.rst in the kernel).
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool available = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-tile") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return available;
}

MINISP_TILES void configure_tiles() {
  // Static: gcc's intrinsic tells the optimiser of the first 8 bytes alone, and stores into a local would be dropped.
  static constexpr TileConfig kConfig;
  _tile_loadconfig(&kConfig);
}

MINISP_TILES void release_tiles() { _tile_release(); }

MINISP_TILES void multiply_block(Sums c, TilePair a, TilePair b, int64_t steps, bool add) {
  const int64_t c_bytes = c.stride * sizeof(float);
  float* const lower = c.data + kTileEdge * c.stride;
  if (add) {
    _tile_loadd(0, c.data, c_bytes);
    _tile_loadd(1, c.data + kTileEdge, c_bytes);
    _tile_loadd(2, lower, c_bytes);
    _tile_loadd(3, lower + kTileEdge, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, a.first + step * a.step, a.row_bytes);
    _tile_loadd(6, b.first + step * b.step, b.row_bytes);
    _tile_loadd(5, a.second + step * a.step, a.row_bytes);
    _tile_loadd(7, b.second + step * b.step, b.row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c.data, c_bytes);
  _tile_stored(1, c.data + kTileEdge, c_bytes);
  _tile_stored(2, lower, c_bytes);
  _tile_stored(3, lower + kTileEdge, c_bytes);
}

void multiply(Sums c, RowOrder a, PairOrder b, Extent extent, bool add) {
  for (int64_t row = 0; row < extent.rows; row += 2 * kTileEdge)
    for (int64_t column = 0; column < extent.columns; column += 2 * kTileEdge) {
      const bf16* left = a.data + row * a.stride;
      const bf16* right = b.tiles + column / kTileEdge * kTile;
      multiply_block({c.data + row * c.stride + column, c.stride},
                     {left, left + kTileEdge * a.stride, a.stride * static_cast<int64_t>(sizeof(bf16)), kTileDepth},
                     {right, right + kTile, kTileBytes, b.step * kTile}, extent.depth / kTileDepth, add);
    }
}

MINISP_CLONES void pair_rows(const bf16* matrix, MatrixSize size, bf16* out) {
  uint32_t* pairs = reinterpret_cast<uint32_t*>(out);
  for (int64_t t = 0; t < size.rows; t += 2)
    for (int64_t d = 0; d < size.columns; d += kTileEdge) {
      const bf16* even = matrix + t * size.columns + d;
      const bf16* odd = even + size.columns;
      uint32_t* place = pairs + (t / kTileDepth * (size.columns / kTileEdge) + d / kTileEdge) * kPairs +
                        t % kTileDepth / 2 * kTileEdge;
      for (int64_t lane = 0; lane < kTileEdge; ++lane) place[lane] = even[lane] | static_cast<uint32_t>(odd[lane]) << 16;
    }
}

MINISP_CLONES void pair_columns(const bf16* matrix, MatrixSize size, bf16* out) {
  const uint32_t* source = reinterpret_cast<const uint32_t*>(matrix);
  uint32_t* tile = reinterpret_cast<uint32_t*>(out);
  const int64_t stride = size.columns / 2;
  for (int64_t d = 0; d < stride; d += kTileEdge)
    for (int64_t t = 0; t < size.rows; t += kTileEdge, tile += kPairs)
      for (int64_t k = 0; k < kTileEdge; ++k)
        for (int64_t lane = 0; lane < kTileEdge; ++lane)
          tile[k * kTileEdge + lane] = source[(t + lane) * stride + d + k];
}

MINISP_CLONES void transpose(const bf16* matrix, MatrixSize size, bf16* out) {
  for (int64_t first = 0; first < size.rows; first += kTileDepth)
    for (int64_t d = 0; d < size.columns; ++d)
      for (int64_t t = first; t < first + kTileDepth; ++t) out[d * size.rows + t] = matrix[t * size.columns + d];
}

#else

bool tiles_available() { return false; }
void configure_tiles() {}
void release_tiles() {}

#endif

}  // namespace minisp
