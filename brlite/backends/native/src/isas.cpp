#include "isas.h"

#include "brlite.h"

namespace brlite {

namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_vnni() { return false; }
bool has_avx512_bf16() { return false; }
#endif
bool has_generic() { return true; }

struct Isa {
    bool (*is_there)();
    const Kernels* (*kernels)();
};

constexpr Isa ISAS[BRLITE_NUM_ISAS] = {{has_generic, generic_kernels},
                                       {has_avx2, avx2_kernels},
                                       {has_avx512, avx512_kernels},
                                       {has_avx512_vnni, avx512_vnni_kernels},
                                       {has_avx512_bf16, avx512_bf16_kernels}};

}  // namespace

const Kernels* kernels_of(int isa) {
    if (isa < 0 || isa >= BRLITE_NUM_ISAS || !ISAS[isa].is_there()) return nullptr;
    return ISAS[isa].kernels();
}

}  // namespace brlite

extern "C" {

int32_t brlite_isa_available(int32_t isa) { return brlite::kernels_of(isa) != nullptr; }
int32_t brlite_abi_version(void) { return BRLITE_ABI_VERSION; }
int32_t brlite_kernel_version(void) { return BRLITE_KERNEL_VERSION; }

size_t brlite_struct_size(int32_t which) {
    const size_t sizes[] = {sizeof(brlite_operation), sizeof(brlite_attention), sizeof(brlite_span),
                            sizeof(brlite_draw),      sizeof(brlite_drawn),     sizeof(brlite_plan),
                            sizeof(brlite_batch)};
    return which >= 0 && which < (int32_t)(sizeof sizes / sizeof *sizes) ? sizes[which] : 0;
}

}  // extern "C"
