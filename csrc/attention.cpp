#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "attention_blocks.h"
#include "parallel.h"
#include "tiles.h"

namespace minisp {

#ifdef MINISP_AMX

namespace {

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// One head's (tokens, dim) matrix, padded with zeros to whole blocks and tiles.
MatrixSize padded(const AttentionShape& shape) {
  return {round_up(shape.tokens, kBlock), round_up(shape.dim, kTileDepth)};
}

// One head's matrix, padded, in row order.
void copy_rows(const bf16* source, int64_t stride, const AttentionShape& shape, MatrixSize size, bf16* rows) {
  for (int64_t t = 0; t < shape.tokens; ++t)
    std::memcpy(rows + t * size.columns, source + t * stride, shape.dim * sizeof(bf16));
}

// Copies of one head in the orders that the products want.
struct HeadBuffers {
  MatrixSize size;
  int64_t area = size.rows * size.columns;
  std::vector<bf16> rows, key_rows, value_rows, turned, query_pairs, query_turned, grad_pairs, grad_turned;
  std::vector<float> sums, delta, logsumexp;

  explicit HeadBuffers(const AttentionShape& shape)
      : size(padded(shape)), rows(area), key_rows(area), value_rows(area), turned(area), query_pairs(area),
        query_turned(area), grad_pairs(area), grad_turned(area), sums(area), delta(size.rows), logsumexp(size.rows) {}

  RowOrder key_block(int64_t j) const { return {key_rows.data() + j * kBlock * size.columns, size.columns}; }
  RowOrder value_block(int64_t j) const { return {value_rows.data() + j * kBlock * size.columns, size.columns}; }
  RowOrder turned_block(int64_t j) const { return {turned.data() + j * kBlock, size.rows}; }
  PairOrder over_dims(const std::vector<bf16>& tiles, int64_t i) const {
    return {tiles.data() + i * (kBlock / kTileEdge) * kTile, size.rows / kTileEdge};
  }
  PairOrder over_tokens(const std::vector<bf16>& tiles, int64_t i) const {
    const int64_t step = size.columns / kTileEdge;
    return {tiles.data() + i * (kBlock / kTileDepth) * step * kTile, step};
  }
  Sums query_sums(int64_t i) { return {sums.data() + i * kBlock * size.columns, kBlock}; }
};

void load_head(const AttentionRecord& record, const AttentionShape& shape, int64_t task, HeadBuffers& buffers) {
  const int64_t batch = task / shape.heads, head = task % shape.heads;
  const int64_t shared = head / (shape.heads / shape.kv_heads);
  const MatrixSize size = buffers.size;
  bf16* const rows = buffers.rows.data();
  const auto fetch = [&](const Heads& from, int64_t number, bf16* to) {
    copy_rows(from.at(batch, number), from.token_stride, shape, size, to);
  };
  fetch(record.query, head, rows);
  pair_rows(rows, size, buffers.query_pairs.data());
  pair_columns(rows, size, buffers.query_turned.data());
  fetch(record.grad_out, head, rows);
  pair_rows(rows, size, buffers.grad_pairs.data());
  pair_columns(rows, size, buffers.grad_turned.data());
  fetch(record.out, head, buffers.key_rows.data());
  dot_rows(buffers.key_rows.data(), rows, size, buffers.delta.data());
  fetch(record.key, shared, buffers.key_rows.data());
  transpose(buffers.key_rows.data(), size, buffers.turned.data());
  fetch(record.value, shared, buffers.value_rows.data());
  std::copy_n(record.logsumexp + task * shape.tokens, shape.tokens, buffers.logsumexp.data());
}

// One head: dK and dV (tokens, dim); dQ^T stays in the buffers, a block of queries after the other.
void backward_head(HeadBuffers& buffers, float scale, ScoreBlock& block, float* grad_key, float* grad_value) {
  const MatrixSize size = buffers.size;
  const Extent scores{kBlock, kBlock, size.columns}, keys{kBlock, size.columns, kBlock};
  for (int64_t j = 0; j < size.rows / kBlock; ++j) {
    const Sums key_sums{grad_key + j * kBlock * size.columns, size.columns};
    const Sums value_sums{grad_value + j * kBlock * size.columns, size.columns};
    for (int64_t i = j; i < size.rows / kBlock; ++i) {
      multiply({block.scores, kBlock}, buffers.key_block(j), buffers.over_dims(buffers.query_turned, i), scores, false);
      multiply({block.grad, kBlock}, buffers.value_block(j), buffers.over_dims(buffers.grad_turned, i), scores, false);
      const int64_t first = i * kBlock;
      score_gradient(block, {buffers.logsumexp.data() + first, buffers.delta.data() + first}, scale, i == j);
      multiply(value_sums, {block.probability, kBlock}, buffers.over_tokens(buffers.grad_pairs, i), keys, i > j);
      multiply(key_sums, {block.grad_scores, kBlock}, buffers.over_tokens(buffers.query_pairs, i), keys, i > j);
      multiply(buffers.query_sums(i), buffers.turned_block(j), block.pair_order(), {size.columns, kBlock, kBlock}, j > 0);
    }
  }
}

}  // namespace

void attention_forward(Heads query, Heads key, Heads value, Heads out, float* logsumexp, AttentionShape shape,
                       int num_threads) {
  parallel_for(shape.batch * shape.heads, 1, num_threads, [&](int64_t begin, int64_t end) {
    const TileScope scope;
    HeadBuffers buffers(shape);
    MatrixSize size = buffers.size;
    const auto block = std::make_unique<ScoreBlock>();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / shape.heads, head = task % shape.heads;
      const int64_t shared = head / (shape.heads / shape.kv_heads);
      copy_rows(query.at(batch, head), query.token_stride, shape, size, buffers.rows.data());
      pair_columns(buffers.rows.data(), size, buffers.query_turned.data());
      copy_rows(key.at(batch, shared), key.token_stride, shape, size, buffers.key_rows.data());
      copy_rows(value.at(batch, shared), value.token_stride, shape, size, buffers.value_rows.data());
      transpose(buffers.value_rows.data(), size, buffers.turned.data());
      for (int64_t i = 0; i < size.rows / kBlock; ++i) {
        Running running;
        std::fill(running.largest, running.largest + kBlock, -1e30f);
        std::fill(running.sum, running.sum + kBlock, 0.0f);
        const Sums result = buffers.query_sums(i);
        for (int64_t j = 0; j <= i; ++j) {
          multiply({block->scores, kBlock}, buffers.key_block(j), buffers.over_dims(buffers.query_turned, i),
                   {kBlock, kBlock, size.columns}, false);
          softmax_block(*block, shape.scale, i == j, running);
          if (j) scale_columns(result.data, size.columns, running.factor);
          multiply(result, buffers.turned_block(j), block->pair_order(), {size.columns, kBlock, kBlock}, j > 0);
        }
        const int64_t first = i * kBlock, queries = std::min(kBlock, shape.tokens - first);
        for (int64_t q = 0; q < kBlock; ++q) running.factor[q] = 1.0f / running.sum[q];
        scale_columns(result.data, size.columns, running.factor);
        store_queries(result.data, {queries, shape.dim}, out.at(batch, head) + first * out.token_stride,
                      out.token_stride);
        for (int64_t q = 0; q < queries; ++q)
          logsumexp[task * shape.tokens + first + q] = running.largest[q] + std::log(running.sum[q]);
      }
    }
  });
}

void attention_backward(const AttentionRecord& record, Heads grad_query, Heads grad_key, Heads grad_value,
                        AttentionShape shape, int num_threads) {
  // Every query head sums its own dK and dV, so that threads share nothing; those of a group are added at the end.
  const MatrixSize size = padded(shape);
  const int64_t area = size.rows * size.columns, tasks = shape.batch * shape.heads;
  const std::unique_ptr<float[]> sums(new float[2 * tasks * area]);
  float* const key_sums = sums.get();
  float* const value_sums = key_sums + tasks * area;
  parallel_for(tasks, 1, num_threads, [&](int64_t begin, int64_t end) {
    const TileScope scope;
    HeadBuffers buffers(shape);
    const auto block = std::make_unique<ScoreBlock>();
    for (int64_t task = begin; task < end; ++task) {
      load_head(record, shape, task, buffers);
      backward_head(buffers, shape.scale, *block, key_sums + task * area, value_sums + task * area);
      const Heads& to = grad_query;
      for (int64_t first = 0; first < shape.tokens; first += kBlock)
        store_queries(buffers.query_sums(first / kBlock).data, {std::min(kBlock, shape.tokens - first), shape.dim},
                      to.at(task / shape.heads, task % shape.heads) + first * to.token_stride,
                      to.token_stride);
    }
  });
  parallel_for(shape.batch * shape.kv_heads, 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / shape.kv_heads, head = task % shape.kv_heads;
      const int64_t group = shape.heads / shape.kv_heads, first = task * group * area;
      const auto add = [&](const float* from, const Heads& to) {
        for (int64_t t = 0; t < shape.tokens; ++t)
          add_rows(from + first + t * size.columns, group, area, shape.dim, to.at(batch, head) + t * to.token_stride);
      };
      add(key_sums, grad_key);
      add(value_sums, grad_value);
    }
  });
}

#else

void attention_forward(Heads, Heads, Heads, Heads, float*, AttentionShape, int) {}
void attention_backward(const AttentionRecord&, Heads, Heads, Heads, AttentionShape, int) {}

#endif

}  // namespace minisp
