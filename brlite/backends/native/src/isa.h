// The kernels of one instruction set, whole: isa_*.cpp name it, set the compiler to it and include this file.
// Nothing of the standard library is used below BRLITE_COMPILE_FOR, so no code shared with other files is compiled for
// a processor that may not be there. clang has no GCC pragma "target": it adds the attribute to each function.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "pool.h"
#include "step.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define BRLITE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BRLITE_COMPILE_FOR(set) BRLITE_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define BRLITE_END_COMPILE_FOR BRLITE_PRAGMA(clang attribute pop)
#else
#define BRLITE_COMPILE_FOR(set) BRLITE_PRAGMA(GCC push_options) BRLITE_PRAGMA(GCC target(set))
#define BRLITE_END_COMPILE_FOR BRLITE_PRAGMA(GCC pop_options)
#endif
