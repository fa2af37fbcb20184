#include "table.h"
#include "vectors.h"

namespace minisp::MINISP_LEVEL {

namespace {

// One array holds all three matrices of the elimination of [A | I]: row i is, from its diagonal on,
// what is left of A, and before it row i of the inverse so far; row k of the factor's transpose stays right of the
// diagonal. After step k, rows <= k hold (L^-1) left of and on the diagonal. Returns the first pivot that is not positive
// and finite, or -1.
template <typename T>
MINISP_INLINE int64_t eliminate(T* w, int64_t stride, int64_t size) {
  for (int64_t k = 0; k < size; ++k) {
    T* __restrict row = w + k * stride;
    const T pivot = row[k];
    if (!(pivot > T(0)) || pivot - pivot != T(0)) return k;
    const T scale = T(1) / static_cast<T>(sizeof(T) == 4 ? __builtin_sqrtf(pivot) : __builtin_sqrt(pivot));
    for (int64_t j = 0; j < size; ++j) row[j] *= scale;
    row[k] = scale;
    for (int64_t i = k + 1; i < size; ++i) {
      T* __restrict other = w + i * stride;
      const T factor = row[i];
      for (int64_t j = i; j < size; ++j) other[j] -= factor * row[j];
      for (int64_t j = 0; j <= k; ++j) other[j] -= factor * row[j];
    }
  }
  return -1;
}

}  // namespace

int64_t eliminate_float(float* block, int64_t stride, int64_t size) { return eliminate(block, stride, size); }
int64_t eliminate_double(double* block, int64_t stride, int64_t size) { return eliminate(block, stride, size); }

}  // namespace minisp::MINISP_LEVEL
