#include "norms.h"

#include <algorithm>
#include <vector>

#include "level.h"
#include "numeric.h"
#include "parallel.h"

namespace minisp {

namespace {

// Elements that one thread takes at once at least: a task below this costs more to hand out than to do.
constexpr int64_t kTask = 1 << 14;

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
  parallel_for(shape.rows, tasks_of(shape.columns), num_threads, [&](int64_t first, int64_t last) {
    kernels().norm_rows(hidden, scale.data(), eps, out, inverse, shape, first, last);
  });
}

void rms_norm_backward(const void* grad, const void* hidden, const void* weight, const float* inverse,
                       void* grad_hidden, NormShape shape, int num_threads) {
  const std::vector<float> scale = scale_of(weight, shape);
  parallel_for(shape.rows, tasks_of(shape.columns), num_threads, [&](int64_t first, int64_t last) {
    kernels().norm_backward_rows(grad, hidden, scale.data(), inverse, grad_hidden, shape, first, last);
  });
}

void rotate(const Rotated& query, const Rotated& key, Angles cosine, Angles sine, RotaryShape shape, int num_threads) {
  const int64_t per_token = (query.heads + key.heads) * shape.dim;
  parallel_for(shape.batch * shape.tokens, tasks_of(per_token), num_threads, [&](int64_t first, int64_t last) {
    kernels().rotate_tokens(query, key, cosine, sine, shape, first, last);
  });
}

}  // namespace minisp
