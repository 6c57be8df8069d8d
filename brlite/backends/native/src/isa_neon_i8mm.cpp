// The kernels for Arm processors with i8mm (Armv8.6: Neoverse V1 and N2, Apple M2).
#define BRLITE_ISA neon_i8mm
#define BRLITE_HAS_NEON
#define BRLITE_HAS_DOTPROD
#define BRLITE_HAS_I8MM
#include "isa.h"

#if defined(__aarch64__)
BRLITE_COMPILE_FOR(BRLITE_ARM_I8MM)
#include "isa_end.h"
BRLITE_END_COMPILE_FOR
#else
const brlite::Kernels* brlite::neon_i8mm_kernels() { return nullptr; }
#endif
