#include "norms.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"
#include "numeric.h"
#include "parallel.h"

namespace minisp {

namespace {

// Running sums of one row: independent, so that they fill vectors and hide the latency of additions.
constexpr int64_t kLanes = 32;
// Elements that one thread takes at once at least: a task below this costs more to hand out than to do.
constexpr int64_t kTask = 1 << 14;

// By halves, and not one after the other: rows of one head's dimensions are no longer than a few times the lanes.
MINISP_INLINE float sum_of(float* lanes) {
  for (int64_t step = kLanes / 2; step > 0; step /= 2)
    for (int64_t lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
  return lanes[0];
}

template <typename T>
MINISP_INLINE float norm_row(const T* __restrict x, const float* __restrict scale, float eps, T* __restrict out,
                             NormShape shape) {
  float lanes[kLanes] = {};
  const int64_t whole = shape.columns / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = load(x[i + lane]);
      lanes[lane] += value * value;
    }
  for (int64_t i = whole; i < shape.columns; ++i) lanes[i - whole] += load(x[i]) * load(x[i]);
  const float inverse = 1.0f / std::sqrt(sum_of(lanes) / static_cast<float>(shape.columns) + eps);
  for (int64_t i = 0; i < shape.columns; ++i) store(load(x[i]) * inverse * scale[i], out + i);
  return inverse;
}

template <typename T>
MINISP_INLINE void norm_backward_row(const T* __restrict grad, const T* __restrict x, const float* __restrict scale,
                                     float inverse, T* __restrict out, NormShape shape) {
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
                                RotaryShape shape) {
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
MINISP_INLINE void rotate_token(const Rotated& query, const Rotated& key, Angles cosine, Angles sine, int64_t place,
                                RotaryShape shape) {
  const int64_t batch = place / shape.tokens, token = place % shape.tokens;
  const T* c = static_cast<const T*>(cosine.data) + batch * cosine.batch + token * cosine.token;
  const T* s = static_cast<const T*>(sine.data) + batch * sine.batch + token * sine.token;
  rotate_heads<T>(query, c, s, batch, token, shape);
  rotate_heads<T>(key, c, s, batch, token, shape);
}

// One exported body per storage type: only what is inlined into a clone is compiled for its processor level.
#define MINISP_BODIES(T, name)                                                                                       \
  MINISP_CLONES void norm_rows_##name(const T* hidden, const float* scale, float eps, T* out, float* inverse,        \
                                      NormShape shape, int64_t begin, int64_t end) {                                 \
    for (int64_t row = begin; row < end; ++row)                                                                      \
      inverse[row] = norm_row<T>(hidden + row * shape.columns, scale, eps, out + row * shape.columns, shape);        \
  }                                                                                                                  \
  MINISP_CLONES void norm_backward_rows_##name(const T* grad, const T* hidden, const float* scale, const float* inv, \
                                               T* out, NormShape shape, int64_t begin, int64_t end) {                \
    for (int64_t row = begin; row < end; ++row) {                                                                    \
      const int64_t place = row * shape.columns;                                                                     \
      norm_backward_row<T>(grad + place, hidden + place, scale, inv[row], out + place, shape);                       \
    }                                                                                                                \
  }                                                                                                                  \
  MINISP_CLONES void rotate_tokens_##name(const Rotated& query, const Rotated& key, Angles cosine, Angles sine,      \
                                          RotaryShape shape, int64_t begin, int64_t end) {                           \
    for (int64_t place = begin; place < end; ++place) rotate_token<T>(query, key, cosine, sine, place, shape);       \
  }

MINISP_BODIES(bf16, bf16)
MINISP_BODIES(float, float)

// offset + w, once for all rows.
std::vector<float> scale_of(const void* weight, NormShape shape) {
  std::vector<float> scale(shape.columns);
  for (int64_t i = 0; i < shape.columns; ++i)
    scale[i] = shape.offset + (shape.is_bf16 ? load(static_cast<const bf16*>(weight)[i])
                                             : load(static_cast<const float*>(weight)[i]));
  return scale;
}

int64_t tasks_of(int64_t elements) { return std::max<int64_t>(1, kTask / std::max<int64_t>(1, elements)); }

}  // namespace

void rms_norm(const void* hidden, const void* weight, float eps, void* out, float* inverse, NormShape shape,
              int num_threads) {
  const std::vector<float> scale = scale_of(weight, shape);
  parallel_for(shape.rows, tasks_of(shape.columns), num_threads, [&](int64_t begin, int64_t end) {
    if (shape.is_bf16) {
      norm_rows_bf16(static_cast<const bf16*>(hidden), scale.data(), eps, static_cast<bf16*>(out), inverse, shape,
                     begin, end);
    } else {
      norm_rows_float(static_cast<const float*>(hidden), scale.data(), eps, static_cast<float*>(out), inverse, shape,
                      begin, end);
    }
  });
}

void rms_norm_backward(const void* grad, const void* hidden, const void* weight, const float* inverse,
                       void* grad_hidden, NormShape shape, int num_threads) {
  const std::vector<float> scale = scale_of(weight, shape);
  parallel_for(shape.rows, tasks_of(shape.columns), num_threads, [&](int64_t begin, int64_t end) {
    if (shape.is_bf16) {
      norm_backward_rows_bf16(static_cast<const bf16*>(grad), static_cast<const bf16*>(hidden), scale.data(), inverse,
                              static_cast<bf16*>(grad_hidden), shape, begin, end);
    } else {
      norm_backward_rows_float(static_cast<const float*>(grad), static_cast<const float*>(hidden), scale.data(),
                               inverse, static_cast<float*>(grad_hidden), shape, begin, end);
    }
  });
}

void rotate(const Rotated& query, const Rotated& key, Angles cosine, Angles sine, RotaryShape shape, int num_threads) {
  const int64_t per_token = (query.heads + key.heads) * shape.dim;
  parallel_for(shape.batch * shape.tokens, tasks_of(per_token), num_threads, [&](int64_t begin, int64_t end) {
    if (shape.is_bf16) {
      rotate_tokens_bf16(query, key, cosine, sine, shape, begin, end);
    } else {
      rotate_tokens_float(query, key, cosine, sine, shape, begin, end);
    }
  });
}

}  // namespace minisp
