// The kernels of one instruction set, whole: isa_*.cpp name it, set the compiler to it and include this file.
// Nothing of the standard library is used below the target pragma, so no code shared with other files is compiled for a
// processor that may not be there.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "pool.h"
#include "step.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
