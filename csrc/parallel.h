// A range of work cut in equal parts, one per thread; the calling thread takes the first.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace minisp {

// Calls body(begin, end) for consecutive parts of [0, size) whose edges are multiples of `grain`.
template <typename Body>
void parallel_for(int64_t size, int64_t grain, int num_threads, const Body& body) {
  const int64_t grains = (size + grain - 1) / grain;
  const int64_t parts = grains < num_threads ? grains : num_threads;
  if (parts <= 1) {
    if (size > 0) body(int64_t{0}, size);
    return;
  }
  const auto edge = [&](int64_t part) {
    const int64_t value = grains * part / parts * grain;
    return value < size ? value : size;
  };
  std::vector<std::thread> threads;
  threads.reserve(parts - 1);
  for (int64_t part = 1; part < parts; ++part) threads.emplace_back([&, part] { body(edge(part), edge(part + 1)); });
  body(int64_t{0}, edge(1));
  for (auto& thread : threads) thread.join();
}

}  // namespace minisp
