// What a thread does while it spins, and the mode in which it calculates.
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

// Numbers too small for a float's exponent are zero while this lives: vdpbf16ps knows no others, so no kernel may.
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
