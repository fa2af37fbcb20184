#include "../numeric.h"
#include "table.h"

namespace minisp::MINISP_LEVEL {

namespace {

// Running sums of one row: independent, so that they fill vectors and hide the latency of additions.
constexpr int64_t kLanes = 32;
// By halves, and not one after the other: rows of one head's dimensions are no longer than a few times the lanes.
MINISP_INLINE float sum_of(float* lanes) {
  for (int64_t step = kLanes / 2; step > 0; step /= 2)
    for (int64_t lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
  return lanes[0];
}

template <typename T>
MINISP_INLINE float norm_row(const T* __restrict x, const float* __restrict scale, float eps, T* __restrict out,
                             const NormShape& shape) {
  float lanes[kLanes] = {};
  const int64_t whole = shape.columns / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = load(x[i + lane]);
      lanes[lane] += value * value;
    }
  for (int64_t i = whole; i < shape.columns; ++i) lanes[i - whole] += load(x[i]) * load(x[i]);
  const float inverse = 1.0f / __builtin_sqrtf(sum_of(lanes) / static_cast<float>(shape.columns) + eps);
  for (int64_t i = 0; i < shape.columns; ++i) store(load(x[i]) * inverse * scale[i], out + i);
  return inverse;
}

template <typename T>
MINISP_INLINE void norm_backward_row(const T* __restrict grad, const T* __restrict x, const float* __restrict scale,
                                     float inverse, T* __restrict out, const NormShape& shape) {
  float lanes[kLanes] = {};
  const int64_t whole = shape.columns / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t place = i + lane;
      lanes[lane] += load(grad[place]) * scale[place] * load(x[place]);
    }
  for (int64_t i = whole; i < shape.columns; ++i) lanes[i - whole] += load(grad[i]) * scale[i] * load(x[i]);
  const float along = inverse * (inverse * sum_of(lanes) / static_cast<float>(shape.columns));
  for (int64_t i = 0; i < shape.columns; ++i)
    store(inverse * (load(grad[i]) * scale[i] - load(x[i]) * along), out + i);
}

// (a, b) -> (a c_a - b s_a, b c_b + a s_b) for the halves a and b of a head; the transpose of it going back.
template <typename T, bool is_backward>
MINISP_INLINE void rotate_head(const T* __restrict in, const T* __restrict cosine, const T* __restrict sine,
                               T* __restrict out, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = load(in[i]), b = load(in[half + i]);
    const float sine_a = load(sine[i]), sine_b = load(sine[half + i]);
    const float to_a = is_backward ? sine_b : -sine_a, to_b = is_backward ? -sine_a : sine_b;
    store(a * load(cosine[i]) + b * to_a, out + i);
    store(b * load(cosine[half + i]) + a * to_b, out + half + i);
  }
}

template <typename T>
MINISP_INLINE void rotate_heads(const Rotated& tensor, const T* cosine, const T* sine, int64_t batch, int64_t token,
                                const RotaryShape& shape) {
  const T* in = static_cast<const T*>(tensor.in) + batch * tensor.in_batch + token * tensor.in_token;
  T* out = static_cast<T*>(tensor.out) + batch * tensor.out_batch + token * tensor.out_token;
  for (int64_t head = 0; head < tensor.heads; ++head, in += tensor.in_head, out += tensor.out_head) {
    if (shape.is_backward) {
      rotate_head<T, true>(in, cosine, sine, out, shape.dim / 2);
    } else {
      rotate_head<T, false>(in, cosine, sine, out, shape.dim / 2);
    }
  }
}

template <typename T>
MINISP_INLINE void rotate_token(const Rotated& query, const Rotated& key, const Angles& cosine, const Angles& sine, int64_t place,
                                const RotaryShape& shape) {
  const int64_t batch = place / shape.tokens, token = place % shape.tokens;
  const T* c = static_cast<const T*>(cosine.data) + batch * cosine.batch + token * cosine.token;
  const T* s = static_cast<const T*>(sine.data) + batch * sine.batch + token * sine.token;
  rotate_heads<T>(query, c, s, batch, token, shape);
  rotate_heads<T>(key, c, s, batch, token, shape);
}

template <typename T>
MINISP_INLINE void norm(const void* hidden, const float* scale, float eps, void* out, float* inverse,
                        const NormShape& shape, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t place = row * shape.columns;
    inverse[row] = norm_row(static_cast<const T*>(hidden) + place, scale, eps, static_cast<T*>(out) + place, shape);
  }
}

template <typename T>
MINISP_INLINE void norm_backward(const void* grad, const void* hidden, const float* scale, const float* inverse,
                                 void* out, const NormShape& shape, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t place = row * shape.columns;
    norm_backward_row(static_cast<const T*>(grad) + place, static_cast<const T*>(hidden) + place, scale, inverse[row],
                      static_cast<T*>(out) + place, shape);
  }
}

}  // namespace

void norm_rows(const void* hidden, const float* scale, float eps, void* out, float* inverse, const NormShape& shape,
               int64_t first, int64_t last) {
  if (shape.is_bf16) {
    norm<bf16>(hidden, scale, eps, out, inverse, shape, first, last);
  } else {
    norm<float>(hidden, scale, eps, out, inverse, shape, first, last);
  }
}

void norm_backward_rows(const void* grad, const void* hidden, const float* scale, const float* inverse, void* out,
                        const NormShape& shape, int64_t first, int64_t last) {
  if (shape.is_bf16) {
    norm_backward<bf16>(grad, hidden, scale, inverse, out, shape, first, last);
  } else {
    norm_backward<float>(grad, hidden, scale, inverse, out, shape, first, last);
  }
}

void rotate_tokens(const Rotated& query, const Rotated& key, const Angles& cosine, const Angles& sine,
                   const RotaryShape& shape, int64_t first, int64_t last) {
  for (int64_t place = first; place < last; ++place) {
    if (shape.is_bf16) {
      rotate_token<bf16>(query, key, cosine, sine, place, shape);
    } else {
      rotate_token<float>(query, key, cosine, sine, place, shape);
    }
  }
}

}  // namespace minisp::MINISP_LEVEL
