// The kernels for processors with avx512_vnni.
#define BRLITE_ISA avx512_vnni
#define BRLITE_HAS_AVX512
#define BRLITE_HAS_VNNI
#include "isa.h"

#if defined(__x86_64__)
BRLITE_COMPILE_FOR("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")
#include "isa_end.h"
BRLITE_END_COMPILE_FOR
#else
const brlite::Kernels* brlite::avx512_vnni_kernels() { return nullptr; }
#endif
