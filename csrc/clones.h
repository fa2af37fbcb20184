// One source for every x86-64 level: of a function marked MINISP_CLONES, the loader picks the widest version that the
// processor runs. Only what is inlined into such a function is compiled for that level: mark it MINISP_INLINE.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MINISP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MINISP_CLONES
#endif
#define MINISP_INLINE inline __attribute__((always_inline))
