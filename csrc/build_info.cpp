#include "build_info.h"

#include <sstream>

namespace minisp {

namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

}  // namespace

BuildInfo build_info() {
  BuildInfo info;
  info.version = MINISP_VERSION;
#if defined(__clang__)
  info.compiler = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  info.compiler = std::string("gcc ") + __VERSION__;
#else
  info.compiler = "unknown";
#endif
  info.cxx_standard = __cplusplus;
  info.cuda_archs = split(MINISP_CUDA_ARCHS, ',');
#ifdef MINISP_WITH_CUDA
  info.cuda = true;
#else
  info.cuda = false;
#endif
  return info;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  // The built-in also asks whether the operating system saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
  if (__builtin_cpu_supports("fma")) found.push_back("fma");
  if (__builtin_cpu_supports("avx512f")) found.push_back("avx512f");
  // Names that compilers learnt late: setup.py has asked.
#if defined(MINISP_HAS_avx512_bf16)
  if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512bf16");
#endif
#if defined(MINISP_HAS_amx)
  if (__builtin_cpu_supports("amx-bf16")) found.push_back("amx_bf16");
#endif
#elif defined(__aarch64__)
  found.push_back("neon");
#endif
  return found;
}

}  // namespace minisp
