// Numbers as the CPU kernels use them: stored as bfloat16 or float32, computed in float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "clones.h"

namespace minisp {

using bf16 = uint16_t;

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

// e^x with a relative error of about 2^-22: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial in r (Cody & Waite, 1980),
// times 2^n. Below -87 the result is 0 up to the smallest normal number; above 88 it saturates.
MINISP_INLINE float exponential(float x) {
  const float clamped = std::min(std::max(x, -87.0f), 88.0f);
  const float n = __builtin_rintf(clamped * 1.44269504f);
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
