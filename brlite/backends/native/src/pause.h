// A pause for spinning threads, and the floating-point mode of the kernels.
#pragma once

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

// While an object exists, its thread treats subnormal floats as zero. vdpbf16ps always does, so all kernels must.
class FlushToZero {
 public:
#if defined(__x86_64__)
    FlushToZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushToZero() { _mm_setcsr(saved_); }

 private:
    unsigned saved_;
#else
    FlushToZero() {}
    ~FlushToZero() {}
#endif
};

}  // namespace brlite
