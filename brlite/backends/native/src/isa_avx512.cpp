// The kernels for processors with avx512.
#define BRLITE_ISA avx512
#define BRLITE_HAS_AVX512
#include "isa.h"

#if defined(__x86_64__)
BRLITE_COMPILE_FOR("avx512f,avx512bw,avx512vl,avx512dq,fma")
#include "isa_end.h"
BRLITE_END_COMPILE_FOR
#else
const brlite::Kernels* brlite::avx512_kernels() { return nullptr; }
#endif
