// The kernels for processors with avx2, fma and f16c. All processors with avx2 have the other two.
#define BRLITE_ISA avx2
#define BRLITE_HAS_AVX2
#include "isa.h"

#if defined(__x86_64__)
BRLITE_COMPILE_FOR("avx2,fma,f16c")
#include "isa_end.h"
BRLITE_END_COMPILE_FOR
#else
const brlite::Kernels* brlite::avx2_kernels() { return nullptr; }
#endif
