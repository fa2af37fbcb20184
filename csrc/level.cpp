#include "level.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace minisp {

// setup.py says which levels its compiler can make, MINISP_LEVELS(X) X(portable) X(avx2) ...
#define MINISP_DECLARE(level)    \
  namespace level {              \
  extern const Kernels kernels;  \
  }
MINISP_LEVELS(MINISP_DECLARE)
#undef MINISP_DECLARE

namespace {

struct Entry {
  Level level;
  const Kernels* kernels;
};

#define MINISP_ENTRY(level) {Level::level, &level::kernels},
const Entry kEntries[] = {MINISP_LEVELS(MINISP_ENTRY)};
#undef MINISP_ENTRY

constexpr Level kLevels[] = {Level::portable, Level::avx2, Level::avx512, Level::avx512_bf16, Level::amx};

// The built-in also asks whether the operating system saves the wide registers.
bool offers(Level level) {
#if defined(__x86_64__) && defined(__linux__)
  __builtin_cpu_init();
  switch (level) {
    case Level::portable: return true;
    case Level::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Level::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(MINISP_HAS_avx512_bf16)
    case Level::avx512_bf16: return __builtin_cpu_supports("avx512bf16");
#endif
#if defined(MINISP_HAS_amx)
    case Level::amx: {
      // Linux grants the tile registers' large state on request (Documentation/arch/x86/xstate.rst in the kernel).
      constexpr long kRequestPermission = 0x1023, kTileData = 18;
      return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-tile") &&
             syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }
#endif
    default: return false;
  }
#else
  return level == Level::portable;
#endif
}

Level find_machine_level() {
  Level found = Level::portable;
  for (const Entry& entry : kEntries) {
    // Every level needs those below it.
    if (!offers(entry.level)) break;
    found = entry.level;
  }
  return found;
}

Level find_active_level() {
  const char* const given = std::getenv("MINISP_MAX_CPU_ISA");
  const Level machine = machine_level();
  if (given == nullptr || *given == '\0') return machine;
  std::string known;
  for (const Level level : kLevels) {
    if (std::string(given) == name_of(level)) return level < machine ? level : machine;
    known += (known.empty() ? "" : ", ") + std::string(name_of(level));
  }
  throw std::invalid_argument("Environment variable MINISP_MAX_CPU_ISA: expected one of " + known + ", got '" + given +
                              "'. Name the highest level to use, or unset it for all that the machine has.");
}

}  // namespace

const char* name_of(Level level) {
  switch (level) {
    case Level::avx2: return "avx2";
    case Level::avx512: return "avx512";
    case Level::avx512_bf16: return "avx512_bf16";
    case Level::amx: return "amx";
    default: return "portable";
  }
}

std::vector<std::string> built_levels() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) names.push_back(name_of(entry.level));
  return names;
}

Level machine_level() {
  static const Level level = find_machine_level();
  return level;
}

Level active_level() {
  static const Level level = find_active_level();
  return level;
}

const Kernels& kernels() {
  static const Kernels* const table = [] {
    const Kernels* found = kEntries[0].kernels;
    for (const Entry& entry : kEntries)
      if (entry.level <= active_level()) found = entry.kernels;
    return found;
  }();
  return *table;
}

}  // namespace minisp
