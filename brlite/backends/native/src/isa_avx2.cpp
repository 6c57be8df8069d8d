// The kernels for processors with avx2.
#define BRLITE_ISA avx2
#define BRLITE_HAS_AVX2
#include "isa.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "isa_end.h"
#pragma GCC pop_options
#else
const brlite::Kernels* brlite::avx2_kernels() { return nullptr; }
#endif
