// The kernels for Arm processors with dotprod (Armv8.2: Neoverse N1, Apple M1).
#define BRLITE_ISA neon_dotprod
#define BRLITE_HAS_NEON
#define BRLITE_HAS_DOTPROD
#include "isa.h"

#if defined(__aarch64__)
BRLITE_COMPILE_FOR(BRLITE_ARM_DOTPROD)
#include "isa_end.h"
BRLITE_END_COMPILE_FOR
#else
const brlite::Kernels* brlite::neon_dotprod_kernels() { return nullptr; }
#endif
