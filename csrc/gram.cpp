#include "gram.h"

#include <algorithm>
#include <memory>

#include "level.h"
#include "parallel.h"

namespace minisp {

void gram_update(float* gram, const void* x, Matrix shape, int num_threads) {
  const GramKernels& level = *kernels().gram[shape.is_bf16];
  const int64_t strips = (shape.columns + level.edge - 1) / level.edge, blocks = strips * (strips + 1) / 2;
  const int64_t longest = std::min(level.chunk, shape.rows), bytes = strips * level.strip_bytes(longest);
  constexpr int64_t kAlignment = 64;
  const std::unique_ptr<char[]> packed(new char[2 * bytes + kAlignment]);
  char* const rows = packed.get() + (kAlignment - reinterpret_cast<uintptr_t>(packed.get()) % kAlignment);
  char* const tiles = rows + bytes;
  const int64_t token_bytes = shape.columns * (shape.is_bf16 ? 2 : 4);
  for (int64_t token = 0; token < shape.rows; token += level.chunk) {
    const int64_t count = std::min(level.chunk, shape.rows - token);
    const void* const part = static_cast<const char*>(x) + token * token_bytes;
    parallel_for(strips, 1, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip) level.pack(part, count, shape.columns, strip, rows, tiles);
    });
    // Equal parts of the triangle for every thread.
    parallel_for(blocks, 1, num_threads, [&](int64_t begin, int64_t end) {
      level.update(gram, shape.columns, rows, tiles, count, begin, end);
    });
  }
}

}  // namespace minisp
