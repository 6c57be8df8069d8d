// The kernels for processors with avx512.
#define BRLITE_ISA avx512
#define BRLITE_HAS_AVX512
#include "isa.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#include "isa_end.h"
#pragma GCC pop_options
#else
const brlite::Kernels* brlite::avx512_kernels() { return nullptr; }
#endif
