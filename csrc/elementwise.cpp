#include "elementwise.h"

#include <algorithm>
#include <vector>

#include "level.h"
#include "parallel.h"

namespace minisp {

void activation_backward(void* gate, void* up, void* grad_x, float* sums, Matrix shape, Activation kind,
                         int num_threads) {
  // Threads share columns out, not rows: every sum is then one thread's, in the order of the tokens.
  parallel_for(shape.columns, kElementwiseColumns, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kElementwiseColumns)
      kernels().activation_backward(gate, up, grad_x, sums, shape, kind, first, std::min(kElementwiseColumns, end - first));
  });
}

double cross_entropy(const void* logits, const int64_t* targets, void* gradient, Matrix shape, int num_threads) {
  std::vector<double> loss(shape.rows);
  const int64_t row_bytes = shape.columns * (shape.is_bf16 ? 2 : 4);
  parallel_for(shape.rows, 1, num_threads, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(shape.columns);
    for (int64_t row = begin; row < end; ++row)
      loss[row] = kernels().cross_entropy(static_cast<const char*>(logits) + row * row_bytes, targets[row],
                                          static_cast<char*>(gradient) + row * row_bytes, buffer.data(), shape);
  });
  double sum = 0.0;
  for (const double value : loss) sum += value;
  return sum;
}

}  // namespace minisp
