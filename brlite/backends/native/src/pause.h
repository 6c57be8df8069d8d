// A pause for spinning threads, and the floating-point mode of the kernels.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace brlite {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// While an object exists, its thread treats subnormal floats as zero. vdpbf16ps always does, so all kernels must. One
// result differs between processors: x86 rounds before it compares with the smallest normal number, Arm afterwards.
class FlushToZero {
 public:
#if defined(__x86_64__)
    FlushToZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushToZero() { _mm_setcsr(saved_); }

 private:
    unsigned saved_;
#elif defined(__aarch64__)
    FlushToZero() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" : : "r"(saved_ | 1 << 24) : "memory");
    }
    ~FlushToZero() { asm volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }

 private:
    uint64_t saved_;
#else
    FlushToZero() {}
    ~FlushToZero() {}
#endif
};

}  // namespace brlite
