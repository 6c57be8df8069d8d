// The kernels for every 64-bit Arm processor.
#define BRLITE_ISA neon
#define BRLITE_HAS_NEON
#include "isa.h"

#if defined(__aarch64__)
#include "isa_end.h"
#else
const brlite::Kernels* brlite::neon_kernels() { return nullptr; }
#endif
