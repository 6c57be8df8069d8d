// The kernels for processors with avx512_bf16.
#define BRLITE_ISA avx512_bf16
#define BRLITE_HAS_AVX512
#define BRLITE_HAS_VNNI
#define BRLITE_HAS_BF16
#include "isa.h"

#if defined(__x86_64__)
BRLITE_COMPILE_FOR("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma")
#include "isa_end.h"
BRLITE_END_COMPILE_FOR
#else
const brlite::Kernels* brlite::avx512_bf16_kernels() { return nullptr; }
#endif
