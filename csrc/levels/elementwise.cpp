#include "../numeric.h"
#include "table.h"

namespace minisp::MINISP_LEVEL {

namespace {

struct Sigmoid {
  float value, complement;  // sigma(v), 1 - sigma(v) without cancellation
};

MINISP_INLINE Sigmoid sigmoid(float v) {
  const float e = exponential(-v);
  const float value = 1.0f / (1.0f + e);
  return {value, e * value};
}

struct Value {
  float value, slope;  // act(z), act'(z)
};

template <Activation kind>
MINISP_INLINE Value activate(float z) {
  if constexpr (kind == Activation::silu) {
    const Sigmoid s = sigmoid(z);
    return {z * s.value, s.value * (1.0f + z * s.complement)};
  } else if constexpr (kind == Activation::gelu_tanh) {
    // 0.5 (1 + tanh u) = sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3).
    const float u = 0.7978845608f * (z + 0.044715f * z * z * z);
    const Sigmoid s = sigmoid(2.0f * u);
    const float inner = 2.0f * 0.7978845608f * (1.0f + 3.0f * 0.044715f * z * z);
    return {z * s.value, s.value + z * s.value * s.complement * inner};
  } else if constexpr (kind == Activation::relu) {
    return {z > 0.0f ? z : 0.0f, z > 0.0f ? 1.0f : 0.0f};
  } else {
    const float positive = z > 0.0f ? z : 0.0f;
    return {positive * positive, 2.0f * positive};
  }
}

// Columns [first, first + count) of all rows, count <= kElementwiseColumns.
template <typename T, Activation kind>
MINISP_INLINE void backward_columns(T* gate, T* up, T* grad_x, float* sums, const Matrix& shape, int64_t first,
                                    int64_t count) {
  float absolute[kElementwiseColumns] = {}, squared[kElementwiseColumns] = {}, total[kElementwiseColumns] = {};
  for (int64_t row = 0; row < shape.rows; ++row) {
    T* __restrict z = gate + row * shape.columns + first;
    T* __restrict g = grad_x + row * shape.columns + first;
    T* __restrict u = up == nullptr ? nullptr : up + row * shape.columns + first;
    for (int64_t j = 0; j < count; ++j) {
      const Value a = activate<kind>(load(z[j]));
      const float gradient = load(g[j]);
      const float factor = u == nullptr ? 1.0f : load(u[j]);
      const float x = a.value * factor;
      const float product = x * gradient;
      absolute[j] += __builtin_fabsf(product);
      squared[j] += product * product;
      total[j] += product;
      if (u != nullptr) store(a.value * gradient, u + j);
      store(gradient * factor * a.slope, z + j);
      store(x, g + j);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    sums[first + j] += absolute[j];
    sums[shape.columns + first + j] += squared[j];
    sums[2 * shape.columns + first + j] += total[j];
  }
}

// `-inf` logits are allowed: they are words that cannot come. `buffer` holds one row of exponentials, in cache.
template <typename T>
MINISP_INLINE double cross_entropy_row(const T* logits, int64_t target, T* gradient, float* buffer, int64_t size) {
  constexpr int64_t kLanes = 16;
  float largest[kLanes], sum[kLanes] = {};
  for (float& value : largest) value = -__builtin_inff();
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) largest[lane] = larger(largest[lane], load(logits[i + lane]));
  float top = largest[0];
  for (const float value : largest) top = larger(top, value);
  for (int64_t i = whole; i < size; ++i) top = larger(top, load(logits[i]));
  double total = 0.0;
  // Sixteen running sums over a stretch, then a double: the sum of a long row loses nothing.
  constexpr int64_t kStretch = 4096;
  for (int64_t start = 0; start < whole; start += kStretch) {
    const int64_t stop = smaller(start + kStretch, whole);
    for (float& value : sum) value = 0.0f;
    for (int64_t i = start; i < stop; i += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const float e = exponential(load(logits[i + lane]) - top);
        buffer[i + lane] = e;
        sum[lane] += e;
      }
    for (int64_t lane = 0; lane < kLanes; ++lane) total += sum[lane];
  }
  for (int64_t i = whole; i < size; ++i) total += buffer[i] = exponential(load(logits[i]) - top);
  // Dividing by the sum, and not subtracting its logarithm from the logits, which would round at their magnitude.
  const float scale = static_cast<float>(1.0 / total);
  const float wanted = load(logits[target]);
  for (int64_t i = 0; i < size; ++i) store(buffer[i] * scale, gradient + i);
  store(exponential(wanted - top) * scale - 1.0f, gradient + target);
  return static_cast<double>(top) - static_cast<double>(wanted) + __builtin_log(total);
}

template <typename T>
MINISP_INLINE void backward(void* gate, void* up, void* grad_x, float* sums, const Matrix& shape, Activation kind,
                            int64_t first, int64_t count) {
  T* const z = static_cast<T*>(gate);
  T* const u = static_cast<T*>(up);
  T* const g = static_cast<T*>(grad_x);
  switch (kind) {
    case Activation::silu: return backward_columns<T, Activation::silu>(z, u, g, sums, shape, first, count);
    case Activation::gelu_tanh: return backward_columns<T, Activation::gelu_tanh>(z, u, g, sums, shape, first, count);
    case Activation::relu: return backward_columns<T, Activation::relu>(z, u, g, sums, shape, first, count);
    case Activation::relu2: return backward_columns<T, Activation::relu2>(z, u, g, sums, shape, first, count);
  }
}

}  // namespace

void activation_backward(void* gate, void* up, void* grad_x, float* sums, const Matrix& shape, Activation kind,
                         int64_t first, int64_t count) {
  if (shape.is_bf16) {
    backward<bf16>(gate, up, grad_x, sums, shape, kind, first, count);
  } else {
    backward<float>(gate, up, grad_x, sums, shape, kind, first, count);
  }
}

double cross_entropy(const void* logits, int64_t target, void* gradient, float* buffer, const Matrix& shape) {
  return shape.is_bf16 ? cross_entropy_row(static_cast<const bf16*>(logits), target, static_cast<bf16*>(gradient),
                                           buffer, shape.columns)
                       : cross_entropy_row(static_cast<const float*>(logits), target, static_cast<float*>(gradient),
                                           buffer, shape.columns);
}

}  // namespace minisp::MINISP_LEVEL
