// The operands of the CPU kernels: addresses, shapes and strides.
#pragma once

#include <cstdint>

namespace minisp {

enum class Activation { silu = 0, gelu_tanh = 1, relu = 2, relu2 = 3 };

// A contiguous row-major matrix.
struct Matrix {
  int64_t rows;     // T tokens
  int64_t columns;  // m units, or V words
  bool is_bf16;     // bfloat16; else float32
};

constexpr int64_t kElementwiseColumns = 256;  // the sums of so many columns stay in the first-level cache

// Rows and columns of the diagonal blocks that `eliminate` works on.
constexpr int64_t kEliminated = 128;

struct AttentionShape {
  int64_t batch, heads, kv_heads, tokens, dim;  // heads is a multiple of kv_heads
  float scale;
  bool is_bf16;  // all tensors are bfloat16; else float32
};

// A (batch, heads, tokens, dim) tensor whose last dimension is contiguous; strides in elements.
struct Heads {
  void* data;
  int64_t batch_stride, head_stride, token_stride;

  template <typename T>
  T* at(int64_t batch, int64_t head) const {
    return static_cast<T*>(data) + batch * batch_stride + head * head_stride;
  }
};

struct AttentionInputs {
  Heads query, key, value;
};

// What the backward reads: the forward's inputs and results, and the gradient at its output.
struct AttentionRecord {
  Heads query, key, value, out, grad_out;
  const float* logsumexp;
};

// One head's matrix (tokens, dim), padded to whole blocks.
struct HeadExtent {
  int64_t rows, columns;
};

struct NormShape {
  int64_t rows;     // T tokens, or tokens and heads
  int64_t columns;  // d
  bool is_bf16;
  float offset;  // 0 or 1: what is added to the weight
};

// One tensor (batch, heads, tokens, dim) before and after: addresses, and strides in elements of the first three axes.
// The last axis is contiguous.
struct Rotated {
  const void* in;
  void* out;
  int64_t heads;
  int64_t in_batch, in_head, in_token;
  int64_t out_batch, out_head, out_token;
};

// Cosines or sines (batch, tokens, dim); a batch stride of 0 serves all windows alike.
struct Angles {
  const void* data;
  int64_t batch, token;
};

struct RotaryShape {
  int64_t batch, tokens, dim;
  bool is_bf16;
  bool is_backward;
};

}  // namespace minisp
