// The AVX-512 and AMX intrinsics that csrc/levels/ uses, in plain C++: with this folder before the compiler's own on the
// include path, every level can be compiled, run and checked on every processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64)));
typedef int16_t __m512bh __attribute__((vector_size(64)));
typedef int16_t __m256bh __attribute__((vector_size(32)));

inline float emulated_widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// To nearest even; NaN becomes quiet.
inline __m256bh _mm512_cvtneps_pbh(__m512 values) {
  __m256bh result;
  for (int lane = 0; lane < 16; ++lane) {
    const float value = values[lane];
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = std::isnan(value) ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    result[lane] = static_cast<int16_t>(rounded);
  }
  return result;
}

// sum + a b over the pairs of each lane.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  for (int lane = 0; lane < 16; ++lane)
    for (int i = 1; i >= 0; --i)
      sum[lane] += emulated_widen(static_cast<uint16_t>(a[2 * lane + i])) *
                   emulated_widen(static_cast<uint16_t>(b[2 * lane + i]));
  return sum;
}

// Only to the nearest integer, which is control 8.
inline __m512 _mm512_roundscale_ps(__m512 values, int control) {
  if (control != 8) __builtin_trap();
  for (int lane = 0; lane < 16; ++lane) values[lane] = std::nearbyint(values[lane]);
  return values;
}

inline __m512 _mm512_scalef_ps(__m512 values, __m512 exponents) {
  for (int lane = 0; lane < 16; ++lane) values[lane] *= std::exp2(std::floor(exponents[lane]));
  return values;
}

// The tile registers: 16 rows of 64 bytes, only while they are configured.
struct EmulatedTiles {
  bool configured = false;
  alignas(64) char rows[8][16][64];
};

inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

inline char (&emulated_tile(int tile))[16][64] {
  if (!emulated_tiles().configured) __builtin_trap();
  return emulated_tiles().rows[tile];
}

// Palette 1, eight tiles of 16 rows of 64 bytes: as laid out in Intel's manual, volume 1, section 18.
inline void _tile_loadconfig(const void* config) {
  const unsigned char* bytes = static_cast<const unsigned char*>(config);
  bool valid = bytes[0] == 1 && bytes[1] == 0;
  for (int tile = 0; tile < 8; ++tile)
    valid &= bytes[16 + 2 * tile] == 64 && bytes[17 + 2 * tile] == 0 && bytes[48 + tile] == 16;
  if (!valid) __builtin_trap();
  emulated_tiles().configured = true;
}

inline void _tile_release() { emulated_tiles().configured = false; }

inline void _tile_zero(int tile) { std::memset(emulated_tile(tile), 0, 16 * 64); }

inline void _tile_loadd(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(emulated_tile(tile)[row], static_cast<const char*>(from) + row * stride, 64);
}

inline void _tile_stored(int tile, void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride, emulated_tile(tile)[row], 64);
}

// c (16, 16) += a (16, 32) b (32, 16), b in pairs of rows.
inline void _tile_dpbf16ps(int c, int a, int b) {
  float sums[16][16];
  uint16_t left[16][32], right[16][16][2];
  std::memcpy(sums, emulated_tile(c), sizeof sums);
  std::memcpy(left, emulated_tile(a), sizeof left);
  std::memcpy(right, emulated_tile(b), sizeof right);
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 32; ++k)
      for (int column = 0; column < 16; ++column)
        sums[row][column] += emulated_widen(left[row][k]) * emulated_widen(right[k / 2][column][k % 2]);
  std::memcpy(emulated_tile(c), sums, sizeof sums);
}
