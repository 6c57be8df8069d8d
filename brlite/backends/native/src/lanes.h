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

INLINE Ints splat_int(int32_t x) { return Ints{} + x; }
INLINE Ints bits_of(Floats x) { return (Ints)x; }
INLINE Floats from_bits(Ints x) { return (Floats)x; }

// Sixteen lanes as vectors that the processor has. GCC 12 compares longer ones lane by lane, and keeps those that live
// through a loop in memory: comparisons and sums in loops go by parts.
#if defined(BRLITE_HAS_AVX512)
constexpr int PART_BYTES = 64;
#elif defined(BRLITE_HAS_AVX2)
constexpr int PART_BYTES = 32;
#else
constexpr int PART_BYTES = 16;
#endif
typedef float FloatPart __attribute__((vector_size(PART_BYTES)));
typedef int32_t IntPart __attribute__((vector_size(PART_BYTES)));

template <class Part>
struct Parts {
    Part at[64 / PART_BYTES];
};
typedef Parts<FloatPart> FloatParts;
typedef Parts<IntPart> IntParts;

template <class To, class From>
INLINE To same_bits(From from) {
    static_assert(sizeof(To) == sizeof from, "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

INLINE Ints is_less(Floats a, Floats b) {
    const FloatParts x = same_bits<FloatParts>(a), y = same_bits<FloatParts>(b);
    IntParts mask;
    for (int i = 0; i < 64 / PART_BYTES; i++) mask.at[i] = x.at[i] < y.at[i];
    return same_bits<Ints>(mask);
}

INLINE Ints is_less(Ints a, Ints b) {
    const IntParts x = same_bits<IntParts>(a), y = same_bits<IntParts>(b);
    IntParts mask;
    for (int i = 0; i < 64 / PART_BYTES; i++) mask.at[i] = x.at[i] < y.at[i];
    return same_bits<Ints>(mask);
}

INLINE Ints is_equal(Ints a, Ints b) {
    const IntParts x = same_bits<IntParts>(a), y = same_bits<IntParts>(b);
    IntParts mask;
    for (int i = 0; i < 64 / PART_BYTES; i++) mask.at[i] = x.at[i] == y.at[i];
    return same_bits<Ints>(mask);
}

// a where the mask is -1, b where it is 0.
INLINE Ints choose(Ints mask, Ints a, Ints b) { return (mask & a) | (~mask & b); }
INLINE Floats choose(Ints mask, Floats a, Floats b) { return from_bits(choose(mask, bits_of(a), bits_of(b))); }

// What a loop adds up or compares, held in registers.
struct Running {
    FloatParts parts;

    Running(Floats start) : parts(same_bits<FloatParts>(start)) {}
    Floats value() const { return same_bits<Floats>(parts); }
    void add(Floats x) {
        const FloatParts y = same_bits<FloatParts>(x);
        for (int i = 0; i < 64 / PART_BYTES; i++) parts.at[i] += y.at[i];
    }
    void raise(Floats x) {  // to the larger one
        const FloatParts y = same_bits<FloatParts>(x);
        for (int i = 0; i < 64 / PART_BYTES; i++) parts.at[i] = y.at[i] > parts.at[i] ? y.at[i] : parts.at[i];
    }
};

// 0, 1, 2 … 15
INLINE Ints lane_numbers() { return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// The sum of the lanes: halves onto halves, always in this order.
INLINE float sum_of(Floats x) {
    Floats8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    Floats4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

INLINE float max_of(Floats x) {
    Floats8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
            b = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    a = a > b ? a : b;
    Floats4 c = __builtin_shufflevector(a, a, 0, 1, 2, 3), d = __builtin_shufflevector(a, a, 4, 5, 6, 7);
    c = c > d ? c : d;
    const float even = c[0] > c[2] ? c[0] : c[2], odd = c[1] > c[3] ? c[1] : c[3];
    return even > odd ? even : odd;
}

// The largest magnitude so far, compared as integers: a NaN is larger than everything and is not lost.
INLINE Ints larger_magnitude(Ints best, Floats x) {
    Ints magnitude = bits_of(x) & 0x7fffffff;
    return choose(is_less(best, magnitude), magnitude, best);
}

INLINE float largest_magnitude(Ints best) {
    typedef int32_t Ints8 __attribute__((vector_size(32)));
    typedef int32_t Ints4 __attribute__((vector_size(16)));
    Ints8 a = __builtin_shufflevector(best, best, 0, 1, 2, 3, 4, 5, 6, 7),
          b = __builtin_shufflevector(best, best, 8, 9, 10, 11, 12, 13, 14, 15);
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
    const Ints is_nothing = is_less(x, splat(-87.0f));
    Floats clipped = choose(is_nothing, splat(-87.0f), x);
    clipped = choose(is_less(splat(88.0f), clipped), splat(88.0f), clipped);
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
    return from_bits(bits_of(series * power) & ~is_nothing);
}

// The nearest bfloat16 as a float32, ties to even; numbers too small for a float32's exponent become 0, NaN stays.
INLINE Floats to_bf16(Floats x) {
    Ints bits = bits_of(x);
    Ints odd = (bits >> 16) & 1;
    Ints near = (bits + 0x7fff + odd) & (int32_t)0xffff0000;
    near = choose(is_equal(bits & 0x7f800000, Ints{}), bits & (int32_t)0x80000000, near);
    const Ints is_nan = is_less(splat_int(0x7f800000), bits & 0x7fffffff);
    return from_bits(choose(is_nan, (bits | 0x400000) & (int32_t)0xffff0000, near));
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
