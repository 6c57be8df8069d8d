// Vectors of sixteen floats in portable vector code. Each instruction set compiles it to the same operations in the
// same order, so results have the same bits: multiply-adds are fused only by `fused`, no library functions, one fixed
// order of sums.
//
// Where registers are shorter, a vector is two halves (`Two`), or two halves of two. GCC 12 accepts longer vectors than
// registers, but its code for them is slow: compared lane by lane, filled through memory, and in loops kept in memory.
#pragma once

namespace brlite {
namespace BRLITE_ISA {

#define UNROLLED _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // for lambdas: a call would pass vectors through memory

constexpr int LANES = BRLITE_LANES;

INLINE constexpr int smaller(int a, int b) { return a < b ? a : b; }
INLINE constexpr int larger(int a, int b) { return a > b ? a : b; }
INLINE int rounded_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// ---- Vectors of any length ---------------------------------------------------------------------------------------

template <class Number, int NUM_LANES>
struct Register {
    typedef Number Type __attribute__((vector_size(NUM_LANES * sizeof(Number))));
    typedef Number InMemory
        __attribute__((vector_size(NUM_LANES * sizeof(Number)), aligned(sizeof(Number)), may_alias));
};

template <class Half>
struct Two {
    static constexpr int HALF = sizeof(Half) / 4;
    Half low, high;
    auto operator[](int lane) const { return lane < HALF ? low[lane] : high[lane - HALF]; }
};

#if defined(BRLITE_HAS_AVX512)
typedef Register<float, LANES>::Type Floats;
typedef Register<int32_t, LANES>::Type Ints;
#elif defined(BRLITE_HAS_AVX2)
typedef Two<Register<float, LANES / 2>::Type> Floats;
typedef Two<Register<int32_t, LANES / 2>::Type> Ints;
#else
typedef Two<Two<Register<float, LANES / 4>::Type> > Floats;
typedef Two<Two<Register<int32_t, LANES / 4>::Type> > Ints;
#endif

#define BRLITE_OPERATOR(op)                                                \
    template <class Half>                                                  \
    INLINE Two<Half> operator op(Two<Half> a, Two<Half> b) {               \
        return {a.low op b.low, a.high op b.high};                         \
    }                                                                      \
    template <class Half, class Number>                                    \
    INLINE Two<Half> operator op(Two<Half> a, Number b) {                  \
        return {a.low op b, a.high op b};                                  \
    }                                                                      \
    template <class Half>                                                  \
    INLINE Two<Half> operator op(decltype(Half{}[0] + 0) a, Two<Half> b) { \
        return {a op b.low, a op b.high};                                  \
    }
BRLITE_OPERATOR(+)
BRLITE_OPERATOR(-)
BRLITE_OPERATOR(*)
BRLITE_OPERATOR(/)
BRLITE_OPERATOR(&)
BRLITE_OPERATOR(|)
BRLITE_OPERATOR(^)
BRLITE_OPERATOR(>>)
BRLITE_OPERATOR(<<)
#undef BRLITE_OPERATOR

template <class Half>
INLINE Two<Half> operator-(Two<Half> x) {
    return {-x.low, -x.high};
}

template <class Half>
INLINE Two<Half> operator~(Two<Half> x) {
    return {~x.low, ~x.high};
}

// Each function below has two overloads: one for a register, and one that applies it to both halves of a `Two`.

template <class V>
INLINE auto bits_of(V x) {
    return (typename Register<int32_t, sizeof(V) / 4>::Type) x;
}
template <class Half>
INLINE auto bits_of(Two<Half> x) {
    return Two<decltype(bits_of(x.low))>{bits_of(x.low), bits_of(x.high)};
}

template <class V>
INLINE auto from_bits(V x) {
    return (typename Register<float, sizeof(V) / 4>::Type) x;
}
template <class Half>
INLINE auto from_bits(Two<Half> x) {
    return Two<decltype(from_bits(x.low))>{from_bits(x.low), from_bits(x.high)};
}

// Integers to the nearest floats.
template <class V>
INLINE auto floats_of(V x) {
    return __builtin_convertvector(x, typename Register<float, sizeof(V) / 4>::Type);
}
template <class Half>
INLINE auto floats_of(Two<Half> x) {
    return Two<decltype(floats_of(x.low))>{floats_of(x.low), floats_of(x.high)};
}

// For each lane -1 if a < b, else 0.
template <class V>
INLINE auto is_less(V a, V b) {
    return a < b;
}
template <class Half>
INLINE auto is_less(Two<Half> a, Two<Half> b) {
    return Two<decltype(is_less(a.low, b.low))>{is_less(a.low, b.low), is_less(a.high, b.high)};
}

template <class V>
INLINE V is_equal(V a, V b) {
    return a == b;
}
template <class Half>
INLINE Two<Half> is_equal(Two<Half> a, Two<Half> b) {
    return {is_equal(a.low, b.low), is_equal(a.high, b.high)};
}

// b if it is larger, else a: a NaN in b is ignored. For floats x86 has an instruction that GCC does not find.
template <class V>
INLINE V larger_of(V a, V b) {
    constexpr bool is_float = decltype(V{}[0] + 0)(0.5f) != 0;
#if defined(BRLITE_HAS_AVX512)
    if constexpr (is_float && sizeof(V) == 64) return (V)_mm512_max_ps((__m512)b, (__m512)a);
#elif defined(BRLITE_HAS_AVX2)
    if constexpr (is_float && sizeof(V) == 32) return (V)_mm256_max_ps((__m256)b, (__m256)a);
#endif
    return b > a ? b : a;
}
template <class Half>
INLINE Two<Half> larger_of(Two<Half> a, Two<Half> b) {
    return {larger_of(a.low, b.low), larger_of(a.high, b.high)};
}

// Logical shift: fills with zeros, where `>>` fills with the sign.
template <class V>
INLINE V shifted_right(V x, int num_bits) {
    return (V)((typename Register<uint32_t, sizeof(V) / 4>::Type) x >> num_bits);
}
template <class Half>
INLINE Two<Half> shifted_right(Two<Half> x, int num_bits) {
    return {shifted_right(x.low, num_bits), shifted_right(x.high, num_bits)};
}

template <class V, class Number>
INLINE void fill(V& x, Number value) {
    x = value - V{};
}
template <class Half, class Number>
INLINE void fill(Two<Half>& x, Number value) {
    fill(x.low, value);
    x.high = x.low;
}

// Loads numbers of any type and converts them to the type of `x`. Integers that do not fit lose their upper bits.
template <class V, class Number>
INLINE void read(V& x, const Number* from) {
    x = __builtin_convertvector(*(const typename Register<Number, sizeof(V) / 4>::InMemory*)from, V);
}
template <class Half, class Number>
INLINE void read(Two<Half>& x, const Number* from) {
    read(x.low, from);
    read(x.high, from + x.HALF);
}

template <class V, class Number>
INLINE void write(Number* to, V x) {
    typedef typename Register<Number, sizeof(V) / 4>::InMemory Numbers;
    *(Numbers*)to = __builtin_convertvector(x, Numbers);
}
template <class Half, class Number>
INLINE void write(Number* to, Two<Half> x) {
    write(to, x.low);
    write(to + x.HALF, x.high);
}

// The lower or upper half of the lanes: eight of sixteen, or four of eight.
template <class V>
INLINE auto low_half(V x) {
    if constexpr (sizeof(V) == 64) return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
    if constexpr (sizeof(V) == 32) return __builtin_shufflevector(x, x, 0, 1, 2, 3);
}
template <class V>
INLINE auto high_half(V x) {
    if constexpr (sizeof(V) == 64) return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    if constexpr (sizeof(V) == 32) return __builtin_shufflevector(x, x, 4, 5, 6, 7);
}
template <class Half>
INLINE Half low_half(Two<Half> x) {
    return x.low;
}
template <class Half>
INLINE Half high_half(Two<Half> x) {
    return x.high;
}

// The sum of the lanes. Always in this order: the upper half is added to the lower, until four lanes are left.
template <class V>
INLINE float sum_of(V x) {
    if constexpr (sizeof(V) == 16)
        return (x[0] + x[2]) + (x[1] + x[3]);
    else
        return sum_of(low_half(x) + high_half(x));
}

template <class V>
INLINE auto max_of(V x) {
    if constexpr (sizeof(V) == 16) {
        const V pairs = larger_of(__builtin_shufflevector(x, x, 2, 3, 0, 1), x);
        return larger_of(__builtin_shufflevector(pairs, pairs, 1, 0, 3, 2), pairs)[0];
    } else {
        return max_of(larger_of(high_half(x), low_half(x)));
    }
}

// ---- Sixteen lanes -----------------------------------------------------------------------------------------------

INLINE Floats load(const float* from) {
    Floats x;
    read(x, from);
    return x;
}

INLINE void store(float* to, Floats x) { write(to, x); }

INLINE Floats splat(float value) {
    Floats x;
    fill(x, value);
    return x;
}

INLINE Ints splat_int(int32_t value) {
    Ints x;
    fill(x, value);
    return x;
}

// a * b + c, rounded once.
#if defined(BRLITE_HAS_AVX512)
INLINE Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(BRLITE_HAS_AVX2)
INLINE Floats fused(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
#elif defined(BRLITE_HAS_NEON)
template <class Quarter>
INLINE Quarter fused(Quarter a, Quarter b, Quarter c) {
    return (Quarter)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
template <class Half>
INLINE Two<Half> fused(Two<Half> a, Two<Half> b, Two<Half> c) {
    return {fused(a.low, b.low, c.low), fused(a.high, b.high, c.high)};
}
#else
// The product is exact in double precision. The sum is rounded there to an odd last bit if it is not exact: rounded
// again, to single precision, it is what one rounding gives (Boldo and Melquiond, 2008).
INLINE float fused(float a, float b, float c) {
    const double product = (double)a * b;
    double sum = product + c;
    const double other = sum - product, error = (product - (sum - other)) + (c - other);
    int64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if ((error < 0 || error > 0) && bits % 2 == 0) bits += (error > 0) == (sum > 0) ? 1 : -1;
    memcpy(&sum, &bits, sizeof sum);
    return (float)sum;
}
static __attribute__((noinline)) Floats fused_one_by_one(Floats a, Floats b, Floats c) {
    float of_a[LANES], of_b[LANES], of_c[LANES];
    store(of_a, a);
    store(of_b, b);
    store(of_c, c);
    for (int i = 0; i < LANES; i++) of_c[i] = fused(of_a[i], of_b[i], of_c[i]);
    return load(of_c);
}
#if defined(__SSE2__)
// Four lanes, rounded to double precision and then to single precision. Sets `is_wrong` to -1 where that may differ
// from one rounding. It does only if the sum is not exact and has become a number where the second rounding changes its
// direction. Such a number lies halfway between two floats: it has 25 significant bits or fewer, and ends in 28 zeros.
// A sum is exact if each of its parts is what remains without the other one.
INLINE __m128 fused_twice(__m128 a, __m128 b, __m128 c, __m128i& is_wrong) {
    __m128d sums[2], are_inexact[2];
    UNROLLED for (int i = 0; i < 2; i++) {
        const auto doubles = [i](__m128 x) INLINED { return _mm_cvtps_pd(i ? _mm_movehl_ps(x, x) : x); };
        const __m128d product = doubles(a) * doubles(b), added = doubles(c);
        sums[i] = product + added;
        are_inexact[i] = _mm_or_pd(_mm_cmpneq_pd(sums[i] - product, added), _mm_cmpneq_pd(sums[i] - added, product));
    }
    const auto low_words = [](const __m128d* x) INLINED {
        return _mm_castps_si128(_mm_shuffle_ps(_mm_castpd_ps(x[0]), _mm_castpd_ps(x[1]), 0x88));
    };
    const __m128i last_bits = _mm_and_si128(low_words(sums), _mm_set1_epi32(0x0fffffff));
    is_wrong |= _mm_and_si128(_mm_cmpeq_epi32(last_bits, _mm_setzero_si128()), low_words(are_inexact));
    return _mm_movelh_ps(_mm_cvtpd_ps(sums[0]), _mm_cvtpd_ps(sums[1]));
}
INLINE Floats fused(Floats a, Floats b, Floats c) {
    __m128i is_wrong = _mm_setzero_si128();
    const auto four = [&is_wrong](__m128 a, __m128 b, __m128 c) INLINED { return fused_twice(a, b, c, is_wrong); };
    const Floats sum = {
        {four(a.low.low, b.low.low, c.low.low), four(a.low.high, b.low.high, c.low.high)},
        {four(a.high.low, b.high.low, c.high.low), four(a.high.high, b.high.high, c.high.high)},
    };
    return __builtin_expect(_mm_movemask_epi8(is_wrong), 0) ? fused_one_by_one(a, b, c) : sum;
}
#else
INLINE Floats fused(Floats a, Floats b, Floats c) { return fused_one_by_one(a, b, c); }
#endif
#endif

// 0, 1, 2 … 15
INLINE Ints lane_numbers() {
    static const int32_t numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Ints x;
    read(x, numbers);
    return x;
}

// a where the mask is -1, b where it is 0.
INLINE Ints choose(Ints mask, Ints a, Ints b) { return (mask & a) | (~mask & b); }
INLINE Floats choose(Ints mask, Floats a, Floats b) { return from_bits(choose(mask, bits_of(a), bits_of(b))); }

// The largest magnitude so far, compared as integers. A NaN counts as larger than any number, so it is not lost.
INLINE Ints larger_magnitude(Ints best, Floats x) { return larger_of(best, bits_of(x) & 0x7fffffff); }

INLINE float largest_magnitude(Ints best) {
    const int32_t top = max_of(best);
    float value;
    memcpy(&value, &top, sizeof value);
    return value;
}

INLINE bool is_finite(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits & 0x7f800000) != 0x7f800000;
}

// For each lane -1 if x is neither infinite nor NaN, else 0.
INLINE Ints are_finite(Floats x) { return is_less(bits_of(x) & 0x7fffffff, splat_int(0x7f800000)); }

// 1.5 * 2^23. Added to x, |x| < 2^22, it rounds to the nearest integer, ties to even: the low bits of the sum.
constexpr float ROUNDING_SHIFT = 12582912.0f;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// Integers nearest to x, ties to even, for |x| < 2^22.
INLINE Ints rounded(Floats x) { return bits_of(x + ROUNDING_SHIFT) - bits_of(splat(ROUNDING_SHIFT)); }

// e^x by 2^n * e^r, |r| <= ln 2 / 2, with e^r's series to degree 6. For x from -87 to 88; NaN for NaN, exactly 1 for 0.
INLINE Floats power_of_e(Floats x) {
    Floats shifted = x * LOG2_E + ROUNDING_SHIFT;
    Floats n = shifted - ROUNDING_SHIFT;
    Floats r = x - n * 0.693145752f;  // ln 2 in two parts; this product is exact
    r = r - n * 1.42860677e-6f;
    Floats series = splat(1.0f / 720);
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    return series * from_bits((bits_of(shifted) << 23) + bits_of(splat(1.0f)));
}

// e^x for any x: 0 below -87, e^88 above 88.
INLINE Floats exp_of(Floats x) {
    const Ints is_nothing = is_less(x, splat(-87.0f));
    const Floats clipped = choose(is_nothing, splat(-87.0f), x);
    const Floats power = power_of_e(choose(is_less(splat(88.0f), clipped), splat(88.0f), clipped));
    return from_bits(bits_of(power) & ~is_nothing);
}

// 1.5 * 2^16. The last bit of its sum with a number from 1 to 2 counts 2^-7, as in bfloat16.
constexpr float BF16_SHIFT = 98304.0f;

// 2^(x + 1/2) for x <= 0: 2^n times 2^(r + 1/2), |r| <= 1/2. A softmax divides by the sum of weights, so their common
// factor of 2^(1/2) does not matter; it makes the second factor one from 1 to 2, which a sum rounds to bfloat16. That
// factor is a minimax polynomial of degree 3 with a relative error of 1.1e-4, whose constant is a bfloat16 number. n is
// added to the exponent's bits. The result is that of -125 for x below; NaN for NaN. In four steps, so that other
// operations can run in between.
template <bool IS_BF16>
struct PowerOf2 {
    static constexpr float SHIFT = IS_BF16 ? BF16_SHIFT : 0.0f;
    Floats rest, shifted, series;

    INLINED void begin(Floats x) {
        rest = larger_of(x, splat(-125.0f));
        shifted = rest + ROUNDING_SHIFT;
    }
    INLINED void reduce() {
        rest = rest - (shifted - ROUNDING_SHIFT);
        series = fused(rest, splat(0.08019554615020752f), splat(0.343803733587265f));
    }
    INLINED void evaluate() {
        series = fused(series, rest, splat(0.9801534414291382f));
        series = fused(series, rest, splat(1.4140625f + SHIFT));
    }
    INLINED Floats value() const { return from_bits(bits_of(series - SHIFT) + (bits_of(shifted) << 23)); }
};

template <bool IS_BF16>
INLINE Floats power_of_2(Floats x) {
    PowerOf2<IS_BF16> power;
    power.begin(x);
    power.reduce();
    power.evaluate();
    return power.value();
}

// The nearest bfloat16 as a float32, ties to even. Subnormal numbers become 0; NaN stays NaN.
INLINE Floats to_bf16(Floats x) {
    Ints bits = bits_of(x);
    Ints odd = (bits >> 16) & 1;
    Ints near = (bits + 0x7fff + odd) & (int32_t)0xffff0000;
    near = choose(is_equal(bits & 0x7f800000, Ints{}), bits & (int32_t)0x80000000, near);
    const Ints is_nan = is_less(splat_int(0x7f800000), bits & 0x7fffffff);
    return from_bits(choose(is_nan, (bits | 0x400000) & (int32_t)0xffff0000, near));
}

// bfloat16 numbers as floats.
INLINE Floats from_halves(const uint16_t* from) {
#if defined(BRLITE_HAS_AVX512)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(BRLITE_HAS_AVX2)
    const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)),
                  high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + LANES / 2)));
    return {(__m256)_mm256_slli_epi32(low, 16), (__m256)_mm256_slli_epi32(high, 16)};
#else
    Ints halves;
    read(halves, from);
    return from_bits(halves << 16);
#endif
}

// Signed bytes as floats. GCC compiles `read` to several instructions for each lane.
INLINE Floats from_bytes(const uint8_t* from) {
#if defined(BRLITE_HAS_AVX512)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(BRLITE_HAS_AVX2)
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + LANES / 2))))};
#elif defined(BRLITE_HAS_NEON)
    const int8x16_t bytes = vld1q_s8((const int8_t*)from);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    typedef Register<int32_t, LANES / 4>::Type Quarter;
    return floats_of(Ints{{(Quarter)vmovl_s16(vget_low_s16(low)), (Quarter)vmovl_high_s16(low)},
                          {(Quarter)vmovl_s16(vget_low_s16(high)), (Quarter)vmovl_high_s16(high)}});
#else
    Ints integers;
    read(integers, (const int8_t*)from);
    return floats_of(integers);
#endif
}

// 2^(byte - 127), and 0 for a byte of 0.
INLINE Floats from_exponents(const uint8_t* from) {
#if defined(BRLITE_HAS_AVX512)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)), 23);
#elif defined(BRLITE_HAS_AVX2)
    const __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)),
                  high = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + LANES / 2)));
    return {(__m256)_mm256_slli_epi32(low, 23), (__m256)_mm256_slli_epi32(high, 23)};
#else
    Ints exponents;
    read(exponents, from);
    return from_bits(exponents << 23);
#endif
}

// IEEE half precision to float, exactly. Correct also under FlushToZero, for subnormal halves too.
INLINE Floats from_fp16(const uint16_t* from) {
#if defined(BRLITE_HAS_AVX512)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(BRLITE_HAS_AVX2)
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + LANES / 2)))};
#elif defined(BRLITE_HAS_NEON)
    const float16x8_t low = vreinterpretq_f16_u16(vld1q_u16(from)),
                      high = vreinterpretq_f16_u16(vld1q_u16(from + LANES / 2));
    typedef Register<float, LANES / 4>::Type Quarter;
    return {{(Quarter)vcvt_f32_f16(vget_low_f16(low)), (Quarter)vcvt_high_f32_f16(low)},
            {(Quarter)vcvt_f32_f16(vget_low_f16(high)), (Quarter)vcvt_high_f32_f16(high)}};
#else
    Ints halves;
    read(halves, from);
    const Ints magnitude = halves & 0x7fff;
    Ints bits = (magnitude << 13) + (112 << 23);
    bits = choose(is_less(splat_int(0x7bff), magnitude), bits + (112 << 23), bits);  // infinite, NaN
    bits = choose(is_less(magnitude, splat_int(0x400)), bits_of(floats_of(magnitude) * 5.9604644775390625e-8f), bits);
    return from_bits(bits | (halves & 0x8000) << 16);
#endif
}

#if defined(BRLITE_HAS_AVX2)
// Integers as int16. The order of each sixteen is 0 to 3, 8 to 11, 4 to 7, 12 to 15.
INLINE __m256i packed(Ints x) { return _mm256_packs_epi32((__m256i)x.low, (__m256i)x.high); }
#endif

// Stores integers that fit 16 bits. GCC's code for `write` takes three times as many instructions.
INLINE void write_int16(int16_t* to, Ints x) {
#if defined(BRLITE_HAS_AVX2)
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(packed(x), 0xd8));
#else
    write(to, x);
#endif
}

INLINE void store_halves(uint16_t* to, Floats bf16) { write(to, shifted_right(bits_of(bf16), 16)); }

}  // namespace BRLITE_ISA
}  // namespace brlite
