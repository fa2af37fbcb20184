// Processor levels: what the kernels of csrc/levels/ are compiled for, which of them this machine runs, and which is used.
//
// setup.py compiles every file of csrc/levels/ once per level, each time into a namespace of its own; the table of
// functions of the level in use is `kernels()`.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace minisp {

// In the order of what they add: AVX2 with FMA; AVX-512 (F, BW, DQ, VL); its bfloat16 products; Intel's matrix tiles.
enum class Level { portable, avx2, avx512, avx512_bf16, amx };

const char* name_of(Level level);

// Names of the levels that this build holds, lowest first.
std::vector<std::string> built_levels();

// The highest level that the build holds and the processor and the operating system offer.
Level machine_level();

// The machine's level, or the one that the environment variable MINISP_MAX_CPU_ISA names where that is lower; read once.
// Throws std::invalid_argument where it names no level.
Level active_level();

// The functions of the active level.
const Kernels& kernels();

}  // namespace minisp
