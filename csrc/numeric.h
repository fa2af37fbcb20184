// Numbers as the CPU kernels use them: stored as bfloat16 or float32, computed in float32.
//
// All functions are inlined: each is compiled for the processor level of its caller.
#pragma once

#include <cstdint>
#include <cstring>

#define MINISP_INLINE inline __attribute__((always_inline))

namespace minisp {

using bf16 = uint16_t;

template <typename T>
MINISP_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
MINISP_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}

MINISP_INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

MINISP_INLINE float load(float value) { return value; }

MINISP_INLINE float load(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

MINISP_INLINE void store(float value, float* place) { *place = value; }

// Round to nearest even; NaN stays NaN.
MINISP_INLINE void store(float value, bf16* place) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *place = static_cast<bf16>(value == value ? rounded : 0x7fc0u);
}

MINISP_INLINE bool is_finite(float value) { return value - value == 0.0f; }

// Added and taken away again, it rounds a number below 2^22 to the nearest integer (Knuth, TAOCP vol. 2, 4.2.1), with
// instructions that every level has.
constexpr float kRounder = 12582912.0f;

// e^x with a relative error of about 2^-22: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial in r (Cody & Waite, 1980),
// times 2^n. Below -87 the result is 0 up to the smallest normal number; above 88 it saturates.
MINISP_INLINE float exponential(float x) {
  const float clamped = smaller(larger(x, -87.0f), 88.0f);
  const float n = (clamped * 1.44269504f + kRounder) - kRounder;
  const float r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

}  // namespace minisp
