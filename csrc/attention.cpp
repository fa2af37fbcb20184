#include "attention.h"

#include <memory>

#include "level.h"
#include "parallel.h"

namespace minisp {

void attention_forward(const AttentionInputs& inputs, Heads out, float* logsumexp, const AttentionShape& shape,
                       int num_threads) {
  parallel_for(shape.batch * shape.heads, 1, num_threads, [&](int64_t begin, int64_t end) {
    kernels().attention[shape.is_bf16]->forward(inputs, out, logsumexp, shape, begin, end);
  });
}

void attention_backward(const AttentionRecord& record, Heads grad_query, Heads grad_key, Heads grad_value,
                        const AttentionShape& shape, int num_threads) {
  const AttentionKernels& level = *kernels().attention[shape.is_bf16];
  // Every query head sums its own dK and dV, so that threads share nothing; those of a group are added at the end.
  const HeadExtent extent = level.padded(shape);
  const int64_t tasks = shape.batch * shape.heads, elements = tasks * extent.rows * extent.columns;
  const std::unique_ptr<float[]> sums(new float[2 * elements]);
  float* const key_sums = sums.get();
  float* const value_sums = key_sums + elements;
  parallel_for(tasks, 1, num_threads, [&](int64_t begin, int64_t end) {
    level.backward(record, grad_query, key_sums, value_sums, shape, begin, end);
  });
  parallel_for(shape.batch * shape.kv_heads, 1, num_threads, [&](int64_t begin, int64_t end) {
    level.add_groups(key_sums, grad_key, shape, begin, end);
    level.add_groups(value_sums, grad_value, shape, begin, end);
  });
}

}  // namespace minisp
