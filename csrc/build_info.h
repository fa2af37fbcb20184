// What this build of the extension is, and what the processor it runs on can do.
#pragma once

#include <string>
#include <vector>

namespace minisp {

struct BuildInfo {
  std::string version;                  // of the package, "0.1.0"
  std::string compiler;                 // of the host code, "gcc 12.2.0"
  long cxx_standard;                    // value of __cplusplus, 201703
  bool cuda;                            // CUDA code was compiled in
  std::vector<std::string> cuda_archs;  // "sm_80", ...; empty without CUDA
};

BuildInfo build_info();

// Names of the vector and matrix instruction sets that the processor and the operating system offer, asked at the time
// of the call: a subset of avx2, fma, avx512f, avx512bf16, amx_bf16 on x86-64, {neon} on 64-bit Arm.
std::vector<std::string> instruction_sets();

}  // namespace minisp
