// A range of work cut in equal parts, one per thread.
//
// The threads are those of the OpenMP runtime that the process has loaded (torch's), found by name at run time: its
// idle workers spin, and threads of our own would fight them for the cores. Without one, plain threads do the work.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace minisp {

// Calls run(argument) once on each of num_threads threads of the process's OpenMP runtime; false where there is none.
inline bool run_on_openmp(void (*run)(void*), void* argument, int num_threads) {
#if defined(__linux__)
  // The entry point that compilers call for `#pragma omp parallel`, part of libgomp's stable interface.
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel == nullptr) return false;
  parallel(run, argument, static_cast<unsigned>(num_threads), 0);
  return true;
#else
  return false;
#endif
}

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
  // Threads draw the next part: right even where the runtime grants fewer threads than were asked for.
  std::atomic<int64_t> next{0};
  auto draw = [&] {
    for (int64_t part = next++; part < parts; part = next++) body(edge(part), edge(part + 1));
  };
  using Draw = decltype(draw);
  if (run_on_openmp([](void* self) { (*static_cast<Draw*>(self))(); }, &draw, static_cast<int>(parts))) return;
  std::vector<std::thread> threads;
  threads.reserve(parts - 1);
  for (int64_t part = 1; part < parts; ++part) threads.emplace_back(draw);
  draw();
  for (auto& thread : threads) thread.join();
}

}  // namespace minisp
