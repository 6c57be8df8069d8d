// All kernels for one instruction set. Each isa_*.cpp defines the set's macros and includes this file; it then includes
// isa_end.h, compiled for that set. Code below BRLITE_COMPILE_FOR uses nothing of the standard library: the linker
// keeps one copy of a shared inline function, and that copy could contain instructions that the processor does not
// have. clang has no GCC pragma "target"; there the attribute is added to each function.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "pool.h"
#include "step.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Instructions of avx_vnni are those of avx512_vnni in another encoding. A test builds with BRLITE_VNNI_AS_EVEX, to run
// the kernels for avx_vnni on a processor that has only avx512_vnni.
#if defined(BRLITE_VNNI_AS_EVEX)
#define BRLITE_VNNI "%{evex%} "
#else
#define BRLITE_VNNI "%{vex%} "
#endif

// How clang and GCC name Arm's extensions.
#if defined(__clang__)
#define BRLITE_ARM_DOTPROD "dotprod"
#define BRLITE_ARM_I8MM "dotprod,i8mm"
#else
#define BRLITE_ARM_DOTPROD "arch=armv8.2-a+dotprod"
#define BRLITE_ARM_I8MM "arch=armv8.2-a+dotprod+i8mm"
#endif

#define BRLITE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BRLITE_COMPILE_FOR(set) BRLITE_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define BRLITE_END_COMPILE_FOR BRLITE_PRAGMA(clang attribute pop)
#else
#define BRLITE_COMPILE_FOR(set) BRLITE_PRAGMA(GCC push_options) BRLITE_PRAGMA(GCC target(set))
#define BRLITE_END_COMPILE_FOR BRLITE_PRAGMA(GCC pop_options)
#endif
