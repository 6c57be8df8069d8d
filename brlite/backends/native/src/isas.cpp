#include "isas.h"

#include <initializer_list>

#include "brlite.h"
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace brlite {

namespace {

#if defined(__x86_64__)
// Not __builtin_cpu_supports: with zig's runtime library it returns 0 for every feature.
struct Leaf {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    Leaf(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool all_set(unsigned bits, std::initializer_list<int> wanted) {
    for (int bit : wanted)
        if (!(bits >> bit & 1)) return false;
    return true;
}

// Whether the operating system saves these register sets when it switches threads (bits of XCR0).
bool saves(unsigned parts) {
    if (!all_set(Leaf(1, 0).ecx, {27})) return false;  // osxsave
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & parts) == parts;
}

// Bits of leaf 1: 12 fma, 28 avx, 29 f16c. Of leaf 7: 5 avx2, 16 avx512f, 17 dq, 30 bw, 31 vl; 11 vnni. Of its subleaf
// 1: 4 avx_vnni, 5 bf16.
bool has_avx2() { return saves(0x06) && all_set(Leaf(1, 0).ecx, {12, 28, 29}) && all_set(Leaf(7, 0).ebx, {5}); }
bool has_avx512() { return has_avx2() && saves(0xe6) && all_set(Leaf(7, 0).ebx, {16, 17, 30, 31}); }
bool has_avx512_vnni() { return has_avx512() && all_set(Leaf(7, 0).ecx, {11}); }
bool has_avx512_bf16() { return has_avx512_vnni() && all_set(Leaf(7, 1).eax, {5}); }
#if defined(BRLITE_VNNI_AS_EVEX)
bool has_avx_vnni() { return has_avx512_vnni(); }
#else
bool has_avx_vnni() { return has_avx2() && all_set(Leaf(7, 1).eax, {4}); }
#endif
#else
bool has_avx2() { return false; }
bool has_avx_vnni() { return false; }
bool has_avx512() { return false; }
bool has_avx512_vnni() { return false; }
bool has_avx512_bf16() { return false; }
#endif

#if defined(__aarch64__) && defined(__linux__)
// Bits of Linux's asm/hwcap.h.
bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_i8mm() { return has_dotprod() && getauxval(AT_HWCAP2) >> 13 & 1; }
#elif defined(__aarch64__) && defined(__APPLE__)
bool has_feature(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif
bool is_there() { return true; }

struct Isa {
    bool (*is_on_processor)();
    const Kernels* (*kernels)();
};

constexpr Isa ISAS[BRLITE_NUM_ISAS] = {{is_there, generic_kernels},
                                       {has_avx2, avx2_kernels},
                                       {has_avx_vnni, avx_vnni_kernels},
                                       {has_avx512, avx512_kernels},
                                       {has_avx512_vnni, avx512_vnni_kernels},
                                       {has_avx512_bf16, avx512_bf16_kernels},
                                       {is_there, neon_kernels},
                                       {has_dotprod, neon_dotprod_kernels},
                                       {has_i8mm, neon_i8mm_kernels}};

}  // namespace

const Kernels* kernels_of(int isa) {
    if (isa < 0 || isa >= BRLITE_NUM_ISAS || !ISAS[isa].is_on_processor()) return nullptr;
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
                            sizeof(brlite_batch),     sizeof(brlite_pooling)};
    return which >= 0 && which < (int32_t)(sizeof sizes / sizeof *sizes) ? sizes[which] : 0;
}

}  // extern "C"
