// The vectors of one processor level, in the compilers' own vector extensions: one source for SSE, AVX, AVX-512 and NEON.
//
// This folder's files are compiled once per level (MINISP_LEVEL), into minisp::MINISP_LEVEL. Whatever they use must be
// inlined or stand in that namespace: a function that two levels share would be one level's, by the linker's choice.
// Hence no standard library here beyond memcpy; tests/ops/test_build.py looks at the symbols.
#pragma once

#include "../numeric.h"

#define MINISP_NUMBER_portable 0
#define MINISP_NUMBER_avx2 1
#define MINISP_NUMBER_avx512 2
#define MINISP_NUMBER_avx512_bf16 3
#define MINISP_NUMBER_amx 4
#define MINISP_PASTE_NAMES(a, b) a##b
#define MINISP_PASTE(a, b) MINISP_PASTE_NAMES(a, b)
#define MINISP_NUMBER MINISP_PASTE(MINISP_NUMBER_, MINISP_LEVEL)

#if MINISP_NUMBER >= MINISP_NUMBER_avx512
// gcc 12 warns of the intentionally undefined operands within its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace minisp::MINISP_LEVEL {

constexpr int64_t kLanes = MINISP_NUMBER >= MINISP_NUMBER_avx512 ? 16 : MINISP_NUMBER == MINISP_NUMBER_avx2 ? 8 : 4;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// In every lane. Adding to zero, as integers, compiles to one broadcast from memory; writing lane by lane does not.
MINISP_INLINE Words spread(uint32_t value) { return Words{} + value; }

MINISP_INLINE Floats spread(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return reinterpret_cast<Floats>(spread(bits));
}

MINISP_INLINE Floats load_vector(const float* place) {
  Floats values;
  std::memcpy(&values, place, sizeof values);
  return values;
}

MINISP_INLINE Floats load_vector(const bf16* place) {
  Halves halves;
  std::memcpy(&halves, place, sizeof halves);
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

MINISP_INLINE void store_vector(Floats values, float* place) { std::memcpy(place, &values, sizeof values); }

MINISP_INLINE void store_words(Words values, uint32_t* place) { std::memcpy(place, &values, sizeof values); }

#if MINISP_NUMBER >= MINISP_NUMBER_avx512_bf16

MINISP_INLINE Halves narrow(Floats values) {
  return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(values)));
}

MINISP_INLINE Words narrow_words(Floats values) { return __builtin_convertvector(narrow(values), Words); }

#else

// bfloat16 in the low half of each word: to nearest even; NaN stays NaN.
MINISP_INLINE Words narrow_words(Floats values) {
  const Words bits = reinterpret_cast<Words>(values);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words ordered = reinterpret_cast<Words>(values == values);
  return (ordered & rounded) | (~ordered & 0x7fc0u);
}

MINISP_INLINE Halves narrow(Floats values) { return __builtin_convertvector(narrow_words(values), Halves); }

#endif

MINISP_INLINE void store_vector(Floats values, bf16* place) {
  const Halves halves = narrow(values);
  std::memcpy(place, &halves, sizeof halves);
}

// Two rows of values as one row of words: bfloat16 of `even` in the low halves, of `odd` in the high ones.
MINISP_INLINE Words pair(Floats even, Floats odd) { return narrow_words(even) | narrow_words(odd) << 16; }

// a where the mask is set, else 0.
MINISP_INLINE Floats where(Ints mask, Floats a) { return reinterpret_cast<Floats>(mask & reinterpret_cast<Ints>(a)); }

// Lane numbers first, first + 1, ... that are at least `least`.
MINISP_INLINE Ints from_lane(int64_t first, int64_t least) {
  Ints lanes;
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<int32_t>(lane);
  return lanes >= static_cast<int32_t>(least - first);
}

// `exponential` of numeric.h for x up to 88. A polynomial of degree 5, relative error below 3e-6, does where the result is rounded to
// bfloat16 (2^-9); float32 takes degree 6.
template <int degree>
MINISP_INLINE Floats exponential(Floats x) {
  // In this order NaN stays NaN.
  x = x < -87.0f ? spread(-87.0f) : x;
#if MINISP_NUMBER >= MINISP_NUMBER_avx512
  const Floats n = reinterpret_cast<Floats>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x * 1.44269504f), 8));
#else
  const Floats n = (x * 1.44269504f + kRounder) - kRounder;
#endif
  const Floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Floats p = spread(1.0f / 120.0f);
  if constexpr (degree == 6) p = p + r * (1.0f / 720.0f);
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if MINISP_NUMBER >= MINISP_NUMBER_avx512
  return reinterpret_cast<Floats>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  return p * reinterpret_cast<Floats>((__builtin_convertvector(n, Ints) + 127) << 23);
#endif
}

// body(0), ..., body(count - 1), written out: an array that is indexed so is kept in registers.
template <int64_t count, typename Body>
MINISP_INLINE void unrolled(const Body& body) {
  if constexpr (count > 0) {
    unrolled<count - 1>(body);
    body(count - 1);
  }
}

#define MINISP_LAMBDA __attribute__((always_inline))

// Memory for the length of a block, aligned for every vector and zero at first.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    memory_ = new char[bytes + kAlignment];
    std::memset(memory_, 0, bytes + kAlignment);
    data_ = reinterpret_cast<T*>(memory_ + (kAlignment - reinterpret_cast<uintptr_t>(memory_) % kAlignment));
  }
  ~Buffer() { delete[] memory_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }

 private:
  static constexpr int64_t kAlignment = 64;
  char* memory_;
  T* data_;
};

}  // namespace minisp::MINISP_LEVEL
