// Sixteen floats at a time, in plain vector code that every instruction set turns into its own: the same operations in
// the same order, so the same bits. No fused multiply-add, no library functions, and sums that always fold alike.
#pragma once

namespace brlite {
namespace BRLITE_ISA {

#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float UnalignedFloats __attribute__((vector_size(64), aligned(4)));
typedef int32_t UnalignedInts __attribute__((vector_size(64), aligned(4)));
typedef int16_t Shorts __attribute__((vector_size(32), aligned(2)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats4 __attribute__((vector_size(16)));

constexpr int LANES = BRLITE_LANES;

INLINE int smaller(int a, int b) { return a < b ? a : b; }
INLINE int larger(int a, int b) { return a > b ? a : b; }
INLINE int rounded_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

INLINE Floats splat(float x) { return Floats{} + x; }
INLINE Floats load(const float* from) { return *(const UnalignedFloats*)from; }
INLINE void store(float* to, Floats x) { *(UnalignedFloats*)to = x; }

INLINE Ints bits_of(Floats x) { return (Ints)x; }
INLINE Floats from_bits(Ints x) { return (Floats)x; }

// 0, 1, 2 … 15
INLINE Ints lane_numbers() { return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// The sum of the lanes: halves onto halves, always in this order.
INLINE float sum_of(Floats x) {
    Floats8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    Floats4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

INLINE float max_of(Floats x) {
    Floats8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), b = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    a = a > b ? a : b;
    Floats4 c = __builtin_shufflevector(a, a, 0, 1, 2, 3), d = __builtin_shufflevector(a, a, 4, 5, 6, 7);
    c = c > d ? c : d;
    const float even = c[0] > c[2] ? c[0] : c[2], odd = c[1] > c[3] ? c[1] : c[3];
    return even > odd ? even : odd;
}

// The largest magnitude so far, compared as integers: a NaN is larger than everything and is not lost.
INLINE Ints larger_magnitude(Ints best, Floats x) {
    Ints magnitude = bits_of(x) & 0x7fffffff;
    return magnitude > best ? magnitude : best;
}

INLINE float largest_magnitude(Ints best) {
    typedef int32_t Ints8 __attribute__((vector_size(32)));
    typedef int32_t Ints4 __attribute__((vector_size(16)));
    Ints8 a = __builtin_shufflevector(best, best, 0, 1, 2, 3, 4, 5, 6, 7), b = __builtin_shufflevector(best, best, 8, 9, 10, 11, 12, 13, 14, 15);
    a = a > b ? a : b;
    Ints4 c = __builtin_shufflevector(a, a, 0, 1, 2, 3), d = __builtin_shufflevector(a, a, 4, 5, 6, 7);
    c = c > d ? c : d;
    const int32_t even = c[0] > c[2] ? c[0] : c[2], odd = c[1] > c[3] ? c[1] : c[3];
    const int32_t top = even > odd ? even : odd;
    float value;
    memcpy(&value, &top, sizeof value);
    return value;
}

INLINE bool is_finite(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits & 0x7f800000) != 0x7f800000;
}

// Integers nearest to x, ties to even, for |x| < 2^22. The addition rounds; the sum's low bits are the integer.
INLINE Ints rounded(Floats x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23
    return bits_of(x + magic) - bits_of(splat(magic));
}

// e^x by 2^n * e^r, |r| <= ln 2 / 2, with e^r's series to degree 6. 0 below -87, NaN for NaN, exactly 1 for 0.
INLINE Floats exp_of(Floats x) {
    const float magic = 12582912.0f;
    Floats clipped = x < -87.0f ? splat(-87.0f) : x;
    clipped = clipped > 88.0f ? splat(88.0f) : clipped;
    Floats shifted = clipped * 1.44269504f + magic;
    Floats n = shifted - magic;
    Floats r = clipped - n * 0.693145752f;  // ln 2 in two parts; this product is exact
    r = r - n * 1.42860677e-6f;
    Floats series = splat(1.0f / 720);
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    Floats power = from_bits((bits_of(shifted) << 23) + bits_of(splat(1.0f)));
    return x < -87.0f ? splat(0.0f) : series * power;
}

// The nearest bfloat16 as a float32, ties to even; numbers too small for a float32's exponent become 0, NaN stays.
INLINE Floats to_bf16(Floats x) {
    Ints bits = bits_of(x);
    Ints odd = (bits >> 16) & 1;
    Ints near = (bits + 0x7fff + odd) & (int32_t)0xffff0000;
    near = (bits & 0x7f800000) == 0 ? bits & (int32_t)0x80000000 : near;
    return from_bits((bits & 0x7fffffff) > 0x7f800000 ? (bits | 0x400000) & (int32_t)0xffff0000 : near);
}

INLINE Floats from_halves(const uint16_t* from) {
    return from_bits(__builtin_convertvector(*(const Halves*)from, Ints) << 16);
}

INLINE void store_halves(uint16_t* to, Floats bf16) {
    typedef uint32_t Words __attribute__((vector_size(64)));
    *(Halves*)to = __builtin_convertvector((Words)bits_of(bf16) >> 16, Halves);
}

}  // namespace BRLITE_ISA
}  // namespace brlite
