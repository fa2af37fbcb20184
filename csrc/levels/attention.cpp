#include "attention_blocks.h"
#include "table.h"

namespace minisp::MINISP_LEVEL {

namespace {

template <typename E>
HeadExtent padded(const AttentionShape& shape) {
  return {round_up(shape.tokens, kBlock), round_up(shape.dim, larger(E::kMultiple, int64_t{16}))};
}

// One head's matrix in row order; what is padding stays as it is.
template <typename T, typename Element>
void copy_rows(const T* source, int64_t stride, const AttentionShape& shape, MatrixSize size, Element* rows) {
  for (int64_t t = 0; t < shape.tokens; ++t) {
    if constexpr (sizeof(T) == sizeof(Element)) {
      std::memcpy(rows + t * size.columns, source + t * stride, shape.dim * sizeof(T));
    } else {
      // As vectors or bytes: tiles are made of them as 32-bit words, before which stores of floats need not be done.
      const T* const from = source + t * stride;
      Element* const to = rows + t * size.columns;
      int64_t d = 0;
      for (; d + kLanes <= shape.dim; d += kLanes) store_vector(load_vector(from + d), to + d);
      for (; d < shape.dim; ++d) {
        const Element value = load(from[d]);
        std::memcpy(to + d, &value, sizeof value);
      }
    }
  }
}

// Copies of one head in the orders that the products want, and a block of scores.
template <typename E>
struct Head {
  using Element = typename E::Element;

  MatrixSize size;
  Buffer<Element> rows, key_rows, value_rows, turned, query_tiles, query_turned, grad_tiles, grad_turned;
  Buffer<float> sums, delta, logsumexp;
  Buffer<ScoreBlock<E>> block;

  Head(HeadExtent extent, bool backward)
      : size{extent.rows, extent.columns}, rows(area()), key_rows(area()), value_rows(area()), turned(area()),
        query_tiles(backward ? area() : 0), query_turned(area()), grad_tiles(backward ? area() : 0),
        grad_turned(backward ? area() : 0), sums(area()), delta(size.rows), logsumexp(size.rows), block(1) {}

  int64_t area() const { return size.rows * size.columns; }
  int64_t blocks() const { return size.rows / kBlock; }
  Rows<Element> in_rows(const Buffer<Element>& matrix, int64_t j) const {
    return {matrix.data() + j * kBlock * size.columns, size.columns, E::kDepth};
  }
  Rows<Element> turned_block(int64_t j) const { return {turned.data() + j * kBlock * size.columns, kBlock, E::kDepth}; }
  static Rows<Element> score_rows(const Element* scores) { return {scores, kBlock, E::kDepth}; }
  // A block of 64 tokens as columns of B, dimensions as depth; and the other way round.
  Tiles<Element> over_dims(const Buffer<Element>& tiles, int64_t i) const {
    return {tiles.data() + i * (kBlock / E::kEdge) * E::kTile, size.rows / E::kEdge * E::kTile};
  }
  Tiles<Element> over_tokens(const Buffer<Element>& tiles, int64_t i) const {
    const int64_t step = size.columns / E::kEdge * E::kTile;
    return {tiles.data() + i * (kBlock / E::kDepth) * step, step};
  }
  Sums query_sums(int64_t i) const { return {sums.data() + i * kBlock * size.columns, kBlock}; }
};

// The number of a task's head of queries, and of the head of keys that it shares.
struct Task {
  int64_t batch, head, shared;

  Task(int64_t number, const AttentionShape& shape)
      : batch(number / shape.heads), head(number % shape.heads), shared(head / (shape.heads / shape.kv_heads)) {}
};

// A value that is not finite must not meet the zero weight that an earlier query gives it: 0 * NaN is NaN. Such values
// become 0; returns whether there were any.
template <typename T, typename Element>
bool set_aside(const T* value, int64_t stride, const AttentionShape& shape, MatrixSize size, Element* rows) {
  bool found = false;
  for (int64_t t = 0; t < shape.tokens; ++t) {
    if (finite_row(value + t * stride, shape.dim)) continue;
    found = true;
    for (int64_t d = 0; d < shape.dim; ++d)
      if (!is_finite(load(value[t * stride + d]))) rows[t * size.columns + d] = Element(0);
  }
  return found;
}

// What was set aside reaches the queries from its own token on.
template <typename T>
void bring_back(const T* value, int64_t stride, const AttentionShape& shape, T* out, int64_t out_stride) {
  for (int64_t d = 0; d < shape.dim; ++d) {
    float so_far = 0.0f;
    for (int64_t t = 0; t < shape.tokens; ++t) {
      const float v = load(value[t * stride + d]);
      if (!is_finite(v)) so_far += v;
      if (!is_finite(so_far)) store(load(out[t * out_stride + d]) + so_far, out + t * out_stride + d);
    }
  }
}

// O^T of one block of queries.
template <typename E>
void forward_block(Head<E>& head, int64_t i, float scale, Running& running) {
  ScoreBlock<E>& block = *head.block.data();
  const Sums result = head.query_sums(i);
  for (int64_t q = 0; q < kBlock; ++q) {
    running.largest[q] = -1e30f;
    running.sum[q] = 0.0f;
  }
  for (int64_t j = 0; j <= i; ++j) {
    E::multiply({block.scores, kBlock}, head.in_rows(head.key_rows, j), head.over_dims(head.query_turned, i),
                {kBlock, kBlock, head.size.columns}, false);
    i == j ? softmax_block<E, true>(block, scale, running) : softmax_block<E, false>(block, scale, running);
    if (j) scale_columns(result.data, head.size.columns, running.factor);
    E::multiply(result, head.turned_block(j), block.tiles(), {head.size.columns, kBlock, kBlock}, j > 0);
  }
  for (int64_t q = 0; q < kBlock; ++q) running.factor[q] = 1.0f / running.sum[q];
  scale_columns(result.data, head.size.columns, running.factor);
}

template <typename E, typename T>
void forward(const AttentionInputs& inputs, Heads out, float* logsumexp, const AttentionShape& shape, int64_t first,
             int64_t last) {
  [[maybe_unused]] const typename E::Scope scope;
  Head<E> head(padded<E>(shape), false);
  const MatrixSize size = head.size;
  Running running;
  for (int64_t number = first; number < last; ++number) {
    const Task task(number, shape);
    const auto fetch = [&](const Heads& from, int64_t index, typename E::Element* to) {
      copy_rows(from.at<T>(task.batch, index), from.token_stride, shape, size, to);
    };
    fetch(inputs.query, task.head, head.rows.data());
    tile_columns<E>(head.rows.data(), size, head.query_turned.data());
    fetch(inputs.key, task.shared, head.key_rows.data());
    fetch(inputs.value, task.shared, head.value_rows.data());
    const T* const value = inputs.value.at<T>(task.batch, task.shared);
    const bool aside = set_aside(value, inputs.value.token_stride, shape, size, head.value_rows.data());
    transpose_parts<kBlock>(head.value_rows.data(), size, head.turned.data());
    T* const to = out.at<T>(task.batch, task.head);
    for (int64_t i = 0; i < head.blocks(); ++i) {
      forward_block(head, i, shape.scale, running);
      const int64_t start = i * kBlock, queries = smaller(kBlock, shape.tokens - start);
      store_queries(head.query_sums(i).data, queries, shape.dim, to + start * out.token_stride, out.token_stride);
      for (int64_t q = 0; q < queries; ++q)
        logsumexp[number * shape.tokens + start + q] = running.largest[q] + __builtin_logf(running.sum[q]);
    }
    if (aside) bring_back(value, inputs.value.token_stride, shape, to, out.token_stride);
  }
}

template <typename E, typename T>
void load_head(const AttentionRecord& record, const AttentionShape& shape, int64_t number, Head<E>& head) {
  const Task task(number, shape);
  const MatrixSize size = head.size;
  typename E::Element* const rows = head.rows.data();
  const auto fetch = [&](const Heads& from, int64_t index, typename E::Element* to) {
    copy_rows(from.at<T>(task.batch, index), from.token_stride, shape, size, to);
  };
  fetch(record.query, task.head, rows);
  tile_rows<E>(rows, size, head.query_tiles.data());
  tile_columns<E>(rows, size, head.query_turned.data());
  fetch(record.grad_out, task.head, rows);
  tile_rows<E>(rows, size, head.grad_tiles.data());
  tile_columns<E>(rows, size, head.grad_turned.data());
  fetch(record.out, task.head, head.key_rows.data());
  dot_rows(head.key_rows.data(), rows, size, head.delta.data());
  fetch(record.key, task.shared, head.key_rows.data());
  transpose_parts<kBlock>(head.key_rows.data(), size, head.turned.data());
  fetch(record.value, task.shared, head.value_rows.data());
  std::memcpy(head.logsumexp.data(), record.logsumexp + number * shape.tokens, shape.tokens * sizeof(float));
}

// One head: dK and dV (tokens, dim); dQ^T stays in `head`, a block of queries after the other.
template <typename E>
void backward_head(Head<E>& head, float scale, float* grad_key, float* grad_value) {
  ScoreBlock<E>& block = *head.block.data();
  const int64_t columns = head.size.columns;
  const Extent scores{kBlock, kBlock, columns}, keys{kBlock, columns, kBlock};
  for (int64_t j = 0; j < head.blocks(); ++j) {
    const Sums key_sums{grad_key + j * kBlock * columns, columns}, value_sums{grad_value + j * kBlock * columns, columns};
    for (int64_t i = j; i < head.blocks(); ++i) {
      E::multiply({block.scores, kBlock}, head.in_rows(head.key_rows, j), head.over_dims(head.query_turned, i), scores,
                  false);
      E::multiply({block.grad, kBlock}, head.in_rows(head.value_rows, j), head.over_dims(head.grad_turned, i), scores,
                  false);
      const int64_t start = i * kBlock;
      const QueryRows queries{head.logsumexp.data() + start, head.delta.data() + start};
      i == j ? score_gradient<E, true>(block, queries, scale) : score_gradient<E, false>(block, queries, scale);
      E::multiply(value_sums, head.score_rows(block.probability), head.over_tokens(head.grad_tiles, i), keys, i > j);
      E::multiply(key_sums, head.score_rows(block.grad_scores), head.over_tokens(head.query_tiles, i), keys, i > j);
      E::multiply(head.query_sums(i), head.turned_block(j), block.tiles(), {columns, kBlock, kBlock}, j > 0);
    }
  }
}

template <typename E, typename T>
void backward(const AttentionRecord& record, Heads grad_query, float* key_sums, float* value_sums,
              const AttentionShape& shape, int64_t first, int64_t last) {
  [[maybe_unused]] const typename E::Scope scope;
  Head<E> head(padded<E>(shape), true);
  for (int64_t number = first; number < last; ++number) {
    load_head<E, T>(record, shape, number, head);
    backward_head(head, shape.scale, key_sums + number * head.area(), value_sums + number * head.area());
    const Task task(number, shape);
    T* const to = grad_query.at<T>(task.batch, task.head);
    for (int64_t start = 0; start < shape.tokens; start += kBlock)
      store_queries(head.query_sums(start / kBlock).data, smaller(kBlock, shape.tokens - start), shape.dim,
                    to + start * grad_query.token_stride, grad_query.token_stride);
  }
}

template <typename E, typename T>
void add_groups(const float* sums, Heads gradient, const AttentionShape& shape, int64_t first, int64_t last) {
  const HeadExtent extent = padded<E>(shape);
  const int64_t area = extent.rows * extent.columns, group = shape.heads / shape.kv_heads;
  for (int64_t number = first; number < last; ++number) {
    T* const to = gradient.at<T>(number / shape.kv_heads, number % shape.kv_heads);
    for (int64_t t = 0; t < shape.tokens; ++t)
      add_rows(sums + number * group * area + t * extent.columns, group, area, shape.dim, to + t * gradient.token_stride);
  }
}

template <typename E, typename T>
constexpr AttentionKernels kernels_of() {
  return {&padded<E>, &forward<E, T>, &backward<E, T>, &add_groups<E, T>};
}

}  // namespace

const AttentionKernels attention_float = kernels_of<FloatEngine, float>();
const AttentionKernels attention_bf16 = kernels_of<NarrowEngine, bf16>();

}  // namespace minisp::MINISP_LEVEL
