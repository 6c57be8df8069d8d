// The kernels for processors with avx2 and avx_vnni, but without avx512 (Intel since Alder Lake).
#define BRLITE_ISA avx_vnni
#define BRLITE_HAS_AVX2
#define BRLITE_HAS_VNNI
#include "isa.h"

#if defined(__x86_64__) && (__clang_major__ >= 12 || (!defined(__clang__) && __GNUC__ >= 11))
BRLITE_COMPILE_FOR("avx2,fma,f16c,avxvnni")
#include "isa_end.h"
BRLITE_END_COMPILE_FOR
#else
const brlite::Kernels* brlite::avx_vnni_kernels() { return nullptr; }
#endif
