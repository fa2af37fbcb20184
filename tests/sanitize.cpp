// Every CPU kernel on small and ragged shapes, built with the address and undefined-behaviour sanitizers. Results are
// compared where it takes one line; their accuracy is tested from Python and by levels.cpp.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "attention.h"
#include "cholesky_cpu.h"
#include "elementwise.h"
#include "gram.h"
#include "level.h"
#include "numeric.h"

namespace {

std::mt19937 generator(0);

float normal() { return std::normal_distribution<float>()(generator); }

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

minisp::bf16 narrow(float value) {
  minisp::bf16 result;
  minisp::store(value, &result);
  return result;
}

std::vector<minisp::bf16> narrow_normals(int64_t count) {
  std::vector<minisp::bf16> values(count);
  for (auto& value : values) value = narrow(normal());
  return values;
}

// Fortran's gemm, column-major, as the solver calls it: A is never transposed.
template <typename T>
void gemm(const char* transposed_a, const char*, const int* m, const int* n, const int* k, const T* alpha, const T* a,
          const int* lda, const T* b, const int* ldb, const T* beta, T* c, const int* ldc) {
  for (int64_t j = 0; j < *n; ++j)
    for (int64_t i = 0; i < *m; ++i) {
      T sum = 0;
      for (int64_t p = 0; p < *k; ++p)
        sum += (*transposed_a == 'T' ? a[i * *lda + p] : a[p * *lda + i]) * b[j * *ldb + p];
      T& place = c[j * *ldc + i];
      place = *alpha * sum + (*beta == T(0) ? T(0) : *beta * place);
    }
}

template <typename T>
void check_cholesky(int64_t n, int64_t count, int64_t panel) {
  constexpr bool is_double = sizeof(T) == 8;
  std::vector<T> matrix(n * n), right(count * n), factors((n + 3) * n);
  for (auto& value : factors) value = normal();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t t = 0; t < n + 3; ++t) matrix[i * n + j] += factors[t * n + i] * factors[t * n + j] / n;
  for (int64_t i = 0; i < n; ++i) matrix[i * n + i] += 1;
  for (auto& value : right) value = normal();
  std::vector<T> factor = matrix, solution = right;
  std::vector<char> workspace(minisp::workspace_bytes(panel, n, is_double));
  const minisp::CholeskyCall call{{factor.data(), n}, n, is_double, panel, workspace.data(), n,
                                  reinterpret_cast<void*>(&gemm<T>), reinterpret_cast<void*>(&gemm<T>)};
  require(minisp::factor_cpu(call) == 0, "a positive definite matrix has good pivots");
  minisp::solve_cpu(call, {solution.data(), n}, count);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t j = 0; j < n; ++j) {
      T left = right[r * n + j];
      for (int64_t i = 0; i < n; ++i) left -= solution[r * n + i] * matrix[i * n + j];
      require(std::fabs(left) < (is_double ? 1e-10 : 1e-2), "X A = R");
    }
  if (n == 0) return;
  factor = matrix;
  factor[(n - 1) * n + n - 1] = std::nan("");
  require(minisp::factor_cpu(call) == n, "the bad pivot is named");
}

void check_elementwise(int64_t rows, int64_t columns, bool gated) {
  for (int kind = 0; kind < 4; ++kind) {
    const minisp::Matrix shape{rows, columns, true};
    auto gate = narrow_normals(rows * columns), up = narrow_normals(rows * columns), grad = narrow_normals(rows * columns);
    std::vector<float> sums(3 * columns), wide(rows * columns, 0.5f), wide_grad(rows * columns, 2.0f);
    minisp::activation_backward(gate.data(), gated ? up.data() : nullptr, grad.data(), sums.data(), shape,
                                static_cast<minisp::Activation>(kind), 2);
    minisp::activation_backward(wide.data(), nullptr, wide_grad.data(), sums.data(), {rows, columns, false},
                                static_cast<minisp::Activation>(kind), 3);
  }
}

void check_cross_entropy(int64_t rows, int64_t columns) {
  std::vector<float> logits(rows * columns), gradient(rows * columns);
  std::vector<int64_t> targets(rows, columns - 1);
  const double loss =
      minisp::cross_entropy(logits.data(), targets.data(), gradient.data(), {rows, columns, false}, 2);
  require(std::fabs(loss - rows * std::log(static_cast<double>(columns))) <= 1e-4 * rows, "the loss of equal logits");
  auto narrow_logits = narrow_normals(rows * columns), narrow_gradient = narrow_logits;
  minisp::cross_entropy(narrow_logits.data(), targets.data(), narrow_gradient.data(), {rows, columns, true}, 2);
}

void check_gram(int64_t tokens, int64_t width) {
  const auto x = narrow_normals(tokens * width);
  std::vector<float> gram(width * width), wide(tokens * width, 1.0f);
  minisp::gram_update(gram.data(), wide.data(), {tokens, width, false}, 2);
  require(gram[0] == tokens, "a sum of ones");
  gram[0] = 0;
  minisp::gram_update(gram.data(), x.data(), {tokens, width, true}, 2);
  double square = 0;
  for (int64_t t = 0; t < tokens; ++t) square += std::pow(minisp::load(x[t * width]), 2);
  require(std::fabs(square - gram[0]) < 1e-3 * (1 + square), "the first element of the Gram matrix");
}

template <typename T>
void check_attention(int64_t tokens, int64_t dim) {
  const minisp::AttentionShape shape{2, 4, 2, tokens, dim, 0.3f, sizeof(T) == 2};
  const auto heads = [&](std::vector<T>& data, int64_t count) {
    return minisp::Heads{data.data(), tokens * count * dim, dim, count * dim};
  };
  const auto normals = [&](int64_t count) {
    std::vector<T> values(count);
    for (T& value : values) minisp::store(normal(), &value);
    return values;
  };
  const int64_t large = 2 * 4 * tokens * dim, small = large / 2;
  auto q = normals(large), k = normals(small), v = normals(small), grad = normals(large);
  std::vector<T> out(large), grad_q(large), grad_k(small), grad_v(small);
  std::vector<float> logsumexp(2 * 4 * tokens);
  minisp::attention_forward({heads(q, 4), heads(k, 2), heads(v, 2)}, heads(out, 4), logsumexp.data(), shape, 3);
  for (int64_t d = 0; d < dim; ++d) require(out[d] == v[d], "the first token attends to itself");
  minisp::attention_backward({heads(q, 4), heads(k, 2), heads(v, 2), heads(out, 4), heads(grad, 4), logsumexp.data()},
                             heads(grad_q, 4), heads(grad_k, 2), heads(grad_v, 2), shape, 3);
}

}  // namespace

int main() {
  for (const int64_t n : {0, 1, 5, 127, 128, 129, 300, 520})
    for (const int64_t panel : {int64_t{128}, minisp::kWidePanel}) {
      check_cholesky<float>(n, 3, panel);
      if (n <= 300 || panel == 128) check_cholesky<double>(n, 1, panel);
      if (n == 5) check_cholesky<float>(n, 12, panel);
    }
  for (const int64_t rows : {0, 1, 9})
    for (const int64_t columns : {1, 17, 300}) {
      check_elementwise(rows, columns, true);
      check_elementwise(rows, columns, false);
      check_cross_entropy(rows, columns);
    }
  for (const int64_t tokens : {1, 31, 64, 70, 300})
    for (const int64_t width : {1, 16, 33, 100}) check_gram(tokens, width);
  for (const int64_t tokens : {1, 63, 64, 65, 130})
    for (const int64_t dim : {1, 31, 40}) {
      check_attention<float>(tokens, dim);
      check_attention<minisp::bf16>(tokens, dim);
    }
  // The widest head, once: without optimisation it takes most of the time.
  check_attention<float>(3, 512);
  check_attention<minisp::bf16>(3, 512);
  std::puts("clean");
}
