// Gram matrix and attention of every processor level against plain double computations, on small and ragged shapes.
//
// Built by tests/ops/test_levels.py with every level's kernels compiled for the machine at hand: what it has not is emulated
// (tests/emulated/). Prints one line per level and type. With an argument, few shapes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels.h"
#include "level.h"
#include "numeric.h"

#define MINISP_DECLARE(level)    \
  namespace minisp::level {      \
  extern const Kernels kernels;  \
  }
MINISP_LEVELS(MINISP_DECLARE)

namespace {

using minisp::bf16;
using Doubles = std::vector<double>;

std::mt19937 generator(0);

struct Errors {
  double largest = 0;

  // Relative to the largest element, as in tests/ops/test_ops.py; units are roundings of the storage.
  void note(const Doubles& exact, const Doubles& found, double eps) {
    double scale = 1e-30, error = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      scale = std::fmax(scale, std::fabs(exact[i]));
      // A comparison that NaN fails.
      error = std::fabs(exact[i] - found[i]) <= error ? error : std::fabs(exact[i] - found[i]);
    }
    const double units = error / scale / eps;
    largest = units <= largest ? largest : units;
  }
};

template <typename T>
std::vector<T> normals(int64_t count, float scale = 1.0f) {
  std::vector<T> values(count);
  std::normal_distribution<float> normal;
  for (T& value : values) minisp::store(scale * normal(generator), &value);
  return values;
}

template <typename T>
Doubles widened(const std::vector<T>& values) {
  Doubles result;
  for (const T value : values) result.push_back(minisp::load(value));
  return result;
}

template <typename T>
constexpr bool is_narrow = sizeof(T) == 2;
template <typename T>
constexpr double kEps = is_narrow<T> ? 0x1p-7 : 0x1p-23;

template <typename T>
void check_gram(const minisp::Kernels& kernels, int64_t tokens, int64_t width, Errors& errors) {
  const minisp::GramKernels& level = *kernels.gram[is_narrow<T>];
  const auto x = normals<T>(tokens * width);
  std::vector<float> gram(width * width, 1.0f);
  const int64_t strips = (width + level.edge - 1) / level.edge;
  for (int64_t token = 0; token < tokens; token += level.chunk) {
    const int64_t count = std::min(level.chunk, tokens - token);
    // Filled with NaN: everything that is read must have been written.
    std::vector<char> rows(strips * level.strip_bytes(count), '\xff'), tiles = rows;
    for (int64_t strip = 0; strip < strips; ++strip)
      level.pack(x.data() + token * width, count, width, strip, rows.data(), tiles.data());
    const int64_t blocks = strips * (strips + 1) / 2, half = blocks / 2;
    level.update(gram.data(), width, rows.data(), tiles.data(), count, 0, half);
    level.update(gram.data(), width, rows.data(), tiles.data(), count, half, blocks);
  }
  Doubles exact, found;
  for (int64_t i = 0; i < width; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 1;
      for (int64_t t = 0; t < tokens; ++t)
        sum += static_cast<double>(minisp::load(x[t * width + i])) * minisp::load(x[t * width + j]);
      exact.push_back(sum);
      found.push_back(gram[i * width + j]);
    }
  // Products of bfloat16 are exact: the sums are float32 whatever the inputs.
  errors.note(exact, found, 0x1p-23 * std::sqrt(tokens + 1.0));
}

struct Exact {
  Doubles out, grad_query, grad_key, grad_value;
};

// All tensors (heads, tokens, dim), one batch element.
Exact attention(const minisp::AttentionShape& s, const Doubles& q, const Doubles& k, const Doubles& v, const Doubles& g) {
  const int64_t area = s.tokens * s.dim;
  Exact e{Doubles(q.size()), Doubles(q.size()), Doubles(k.size()), Doubles(k.size())};
  for (int64_t head = 0; head < s.heads; ++head)
    for (int64_t i = 0; i < s.tokens; ++i) {
      const int64_t row = head * area + i * s.dim, shared = head / (s.heads / s.kv_heads) * area;
      Doubles p(i + 1), dp(i + 1);
      double sum = 0, delta = 0;
      for (int64_t j = 0; j <= i; ++j) {
        for (int64_t d = 0; d < s.dim; ++d) p[j] += q[row + d] * k[shared + j * s.dim + d];
        sum += p[j] = std::exp(s.scale * p[j]);
      }
      for (int64_t j = 0; j <= i; ++j) {
        p[j] /= sum;
        for (int64_t d = 0; d < s.dim; ++d) {
          e.out[row + d] += p[j] * v[shared + j * s.dim + d];
          dp[j] += g[row + d] * v[shared + j * s.dim + d];
        }
        delta += p[j] * dp[j];
      }
      for (int64_t j = 0; j <= i; ++j)
        for (int64_t d = 0; d < s.dim; ++d) {
          const int64_t other = shared + j * s.dim + d;
          e.grad_value[other] += p[j] * g[row + d];
          e.grad_query[row + d] += s.scale * p[j] * (dp[j] - delta) * k[other];
          e.grad_key[other] += s.scale * p[j] * (dp[j] - delta) * q[row + d];
        }
    }
  return e;
}

template <typename T>
void check_attention(const minisp::Kernels& kernels, int64_t tokens, int64_t dim, Errors& errors) {
  const minisp::AttentionKernels& level = *kernels.attention[is_narrow<T>];
  const minisp::AttentionShape shape{1, 4, 2, tokens, dim, 0.5f / std::sqrt(static_cast<float>(dim)), is_narrow<T>};
  const int64_t area = tokens * dim;
  auto q = normals<T>(4 * area, 1.5f), k = normals<T>(2 * area, 1.5f), v = normals<T>(2 * area), g = normals<T>(4 * area);
  std::vector<T> out(4 * area), grad_q(4 * area), grad_k(2 * area), grad_v(2 * area);
  std::vector<float> logsumexp(4 * tokens);
  const auto heads = [&](std::vector<T>& data) { return minisp::Heads{data.data(), 0, area, dim}; };
  level.forward({heads(q), heads(k), heads(v)}, heads(out), logsumexp.data(), shape, 0, 4);
  const minisp::HeadExtent extent = level.padded(shape);
  std::vector<float> key_sums(4 * extent.rows * extent.columns), value_sums = key_sums;
  level.backward({heads(q), heads(k), heads(v), heads(out), heads(g), logsumexp.data()}, heads(grad_q), key_sums.data(),
                 value_sums.data(), shape, 0, 3);
  level.backward({heads(q), heads(k), heads(v), heads(out), heads(g), logsumexp.data()}, heads(grad_q), key_sums.data(),
                 value_sums.data(), shape, 3, 4);
  level.add_groups(key_sums.data(), heads(grad_k), shape, 0, 2);
  level.add_groups(value_sums.data(), heads(grad_v), shape, 0, 2);
  const Exact exact = attention(shape, widened(q), widened(k), widened(v), widened(g));
  // As in tests/ops/test_ops.py, where the error that eager arithmetic makes in the same type comes on top.
  const double eps = kEps<T> * (is_narrow<T> ? 2 : 2 * std::sqrt(static_cast<double>(tokens + dim)));
  errors.note(exact.out, widened(out), eps);
  errors.note(exact.grad_value, widened(grad_v), eps);
  // Of a single token, the gradients of query and key are 0 but for the rounding of `out`.
  if (tokens == 1) return;
  errors.note(exact.grad_query, widened(grad_q), eps);
  errors.note(exact.grad_key, widened(grad_k), eps);
}

template <typename T>
void check(const minisp::Kernels& kernels, const char* level, const char* type, bool few) {
  using Sizes = std::vector<int64_t>;
  Errors gram, attention;
  for (const int64_t tokens : few ? Sizes{31, 70} : Sizes{1, 31, 64, 300, 600})
    for (const int64_t width : few ? Sizes{1, 33, 100} : Sizes{1, 17, 33, 100, 200})
      check_gram<T>(kernels, tokens, width, gram);
  for (const int64_t tokens : few ? Sizes{65} : Sizes{1, 5, 63, 64, 130})
    for (const int64_t dim : few ? Sizes{25, 512} : Sizes{8, 25, 32, 40, 128, 512})
      check_attention<T>(kernels, tokens, dim, attention);
  std::printf("%s %s gram %.2f attention %.2f\n", level, type, gram.largest, attention.largest);
  if (!(gram.largest <= 1 && attention.largest <= 1)) std::exit(1);
}

}  // namespace

int main(int count, char**) {
  const bool few = count > 1;
#define MINISP_CHECK(level)                                    \
  check<float>(minisp::level::kernels, #level, "float32", few);     \
  check<bf16>(minisp::level::kernels, #level, "bfloat16", few);
  MINISP_LEVELS(MINISP_CHECK)
}
