#include "elementwise.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"
#include "numeric.h"
#include "parallel.h"

namespace minisp {

namespace {

constexpr int64_t kColumns = 256;  // columns per step: the sums of one step stay in the first-level cache

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

// Columns [first, first + count) of all rows, count <= kColumns.
template <typename T, Activation kind>
MINISP_INLINE void backward_columns(T* gate, T* up, T* grad_x, float* sums, Matrix shape, int64_t first,
                                    int64_t count) {
  float absolute[kColumns] = {}, squared[kColumns] = {}, total[kColumns] = {};
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
      absolute[j] += std::fabs(product);
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
  std::fill(largest, largest + kLanes, -INFINITY);
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) largest[lane] = std::max(largest[lane], load(logits[i + lane]));
  float top = *std::max_element(largest, largest + kLanes);
  for (int64_t i = whole; i < size; ++i) top = std::max(top, load(logits[i]));
  double total = 0.0;
  // Sixteen running sums over a stretch, then a double: the sum of a long row loses nothing.
  constexpr int64_t kStretch = 4096;
  for (int64_t start = 0; start < whole; start += kStretch) {
    const int64_t stop = std::min(start + kStretch, whole);
    std::fill(sum, sum + kLanes, 0.0f);
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
  return static_cast<double>(top) - static_cast<double>(wanted) + std::log(total);
}

// One exported body per storage type. The switches stand here and not in a template taking a function, because only
// what is inlined into a clone is compiled for that clone's processor level.
#define MINISP_SWITCH(kind, call)                                                \
  switch (kind) {                                                                \
    case Activation::silu: { constexpr auto k = Activation::silu; call; break; } \
    case Activation::gelu_tanh: { constexpr auto k = Activation::gelu_tanh; call; break; } \
    case Activation::relu: { constexpr auto k = Activation::relu; call; break; } \
    case Activation::relu2: { constexpr auto k = Activation::relu2; call; break; } \
  }

#define MINISP_BODIES(T, name)                                                                                     \
  MINISP_CLONES void backward_##name(T* gate, T* up, T* grad_x, float* sums, Matrix shape, Activation kind,         \
                                     int64_t first, int64_t count) {                                               \
    MINISP_SWITCH(kind, (backward_columns<T, k>(gate, up, grad_x, sums, shape, first, count)))                     \
  }                                                                                                                \
  MINISP_CLONES double loss_##name(const T* logits, int64_t target, T* gradient, float* buffer, int64_t size) {     \
    return cross_entropy_row<T>(logits, target, gradient, buffer, size);                                           \
  }

MINISP_BODIES(bf16, bf16)
MINISP_BODIES(float, float)

}  // namespace

void activation_backward(void* gate, void* up, void* grad_x, float* sums, Matrix shape, Activation kind,
                         int num_threads) {
  // Threads share columns out, not rows: every sum is then one thread's, in the order of the tokens.
  parallel_for(shape.columns, kColumns, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kColumns) {
      const int64_t count = std::min(kColumns, end - first);
      if (shape.is_bf16) {
        backward_bf16(static_cast<bf16*>(gate), static_cast<bf16*>(up), static_cast<bf16*>(grad_x), sums, shape, kind,
                      first, count);
      } else {
        backward_float(static_cast<float*>(gate), static_cast<float*>(up), static_cast<float*>(grad_x), sums, shape,
                       kind, first, count);
      }
    }
  });
}

double cross_entropy(const void* logits, const int64_t* targets, void* gradient, Matrix shape, int num_threads) {
  std::vector<double> loss(shape.rows);
  parallel_for(shape.rows, 1, num_threads, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(shape.columns);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t offset = row * shape.columns;
      loss[row] = shape.is_bf16 ? loss_bf16(static_cast<const bf16*>(logits) + offset, targets[row],
                                            static_cast<bf16*>(gradient) + offset, buffer.data(), shape.columns)
                                : loss_float(static_cast<const float*>(logits) + offset, targets[row],
                                             static_cast<float*>(gradient) + offset, buffer.data(), shape.columns);
    }
  });
  double sum = 0.0;
  for (const double value : loss) sum += value;
  return sum;
}

}  // namespace minisp
