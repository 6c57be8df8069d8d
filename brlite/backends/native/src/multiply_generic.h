// The innermost products (multiply.h) for processors with none of the other instruction sets.
#pragma once

#include "lanes.h"

namespace brlite {
namespace BRLITE_ISA {

#if defined(__SSE2__)
// Four lanes multiply four pairs: an instruction of every x86-64 processor.
struct Int8 {
    typedef int16_t Row;
    typedef Ints Sum;
    typedef Ints Pair;
    typedef int32_t Broadcast;
    static constexpr int PAIR_BYTES = 32, STEPS = 1;
    static constexpr bool IS_INT8 = true;
    INLINE Sum zero() { return Ints{}; }
    INLINE Sum equal(int32_t value) { return splat_int(value); }
    INLINE Sum plus(Sum a, Sum b) { return a + b; }
    INLINE Pair load(const uint8_t* at, int) {
        const __m128i low = _mm_loadu_si128((const __m128i*)at), high = _mm_loadu_si128((const __m128i*)at + 1);
        const auto words = [](__m128i twice) INLINED { return (Register<int32_t, 4>::Type)_mm_srai_epi16(twice, 8); };
        return {{words(_mm_unpacklo_epi8(low, low)), words(_mm_unpackhi_epi8(low, low))},
                {words(_mm_unpacklo_epi8(high, high)), words(_mm_unpackhi_epi8(high, high))}};
    }
    typedef const uint8_t* Int4Words;
    INLINE Int4Words load_int4_words(const uint8_t* at) { return at; }
    INLINE Pair int4_pair(Int4Words at, int i) {
        Ints words;
        read(words, (const int32_t*)at);
        return (words >> 4 * i) & 0x000f000f;
    }
    INLINE Pair load_q6_k(const uint8_t* group, int pair) {
        const int vector = q6_k_vector(pair), shift = 8 * q6_k_byte(pair);
        Ints words[3];
        for (int i = 0; i < 3; i++) read(words[i], (const int32_t*)(group + 64 * i));
        const auto bits = [&](int i, int at, int mask)
                              INLINED { return (words[i] >> (at + shift)) & (mask << 16 | mask); };
        if (vector < 3) return bits(vector, 0, 63);
        return bits(0, 6, 3) | (bits(1, 6, 3) << 2) | (bits(2, 6, 3) << 4);
    }
    static constexpr int TABLE_BIAS = 0;
    INLINE Pair load_table(const uint8_t* at, int i, const uint8_t* table) {
        int16_t numbers[2 * LANES];
        for (int lane = 0; lane < 2 * LANES; lane++) {
            uint16_t word;
            memcpy(&word, at + 2 * lane, sizeof word);
            numbers[lane] = (int8_t)table[word >> 4 * i & 15];
        }
        Pair pair;
        read(pair, (const int32_t*)numbers);
        return pair;
    }
    INLINE Pair shifted_int4_pair(Int4Words at, int i) { return int4_pair(at, i); }  // not used: one sum
    INLINE Sum shifted_back(Sum sum, int) { return sum; }
    INLINE Broadcast broadcast(const Row* row, int) {
        int32_t pair;
        memcpy(&pair, row, sizeof pair);
        return pair;
    }
    INLINE void add(Sum& sum, Pair weights, Broadcast row) {
        const __m128i pair = _mm_set1_epi32(row);
        const auto four = [pair](Register<int32_t, 4>::Type& sum, Register<int32_t, 4>::Type weights)
                              INLINED { sum += (Register<int32_t, 4>::Type)_mm_madd_epi16((__m128i)weights, pair); };
        four(sum.low.low, weights.low.low);
        four(sum.low.high, weights.low.high);
        four(sum.high.low, weights.high.low);
        four(sum.high.high, weights.high.high);
    }
    INLINE Floats floats(Sum sum) { return floats_of(sum); }
};
#else
struct Int8 {
    typedef int16_t Row;
    typedef Ints Sum;
    struct Pair {
        Ints even, odd;
    };
    struct Broadcast {
        int32_t even, odd;
    };
    static constexpr int PAIR_BYTES = 32, STEPS = 1;
    static constexpr bool IS_INT8 = true;
    INLINE Sum zero() { return Ints{}; }
    INLINE Sum equal(int32_t value) { return splat_int(value); }
    INLINE Sum plus(Sum a, Sum b) { return a + b; }
    INLINE Pair load(const uint8_t* at, int) {
        int8_t even[LANES], odd[LANES];
        for (int i = 0; i < LANES; i++) even[i] = (int8_t)at[2 * i], odd[i] = (int8_t)at[2 * i + 1];
        Pair pair;
        read(pair.even, even);
        read(pair.odd, odd);
        return pair;
    }
    typedef const uint8_t* Int4Words;
    INLINE Int4Words load_int4_words(const uint8_t* at) { return at; }
    INLINE Pair int4_pair(Int4Words at, int i) {
        Ints words;
        read(words, (const int32_t*)at);
        return {(words >> 4 * i) & 15, (words >> (16 + 4 * i)) & 15};
    }
    INLINE Pair load_q6_k(const uint8_t* group, int pair) {
        const int vector = q6_k_vector(pair), shift = 8 * q6_k_byte(pair);
        Ints words[3];
        for (int i = 0; i < 3; i++) read(words[i], (const int32_t*)(group + 64 * i));
        const auto code = [&](int at) INLINED {
            if (vector < 3) return words[vector] >> at & 63;
            return (words[0] >> (at + 6) & 3) | (words[1] >> (at + 4) & 12) | (words[2] >> (at + 2) & 48);
        };
        return {code(shift), code(16 + shift)};
    }
    static constexpr int TABLE_BIAS = 0;
    INLINE Pair load_table(const uint8_t* at, int i, const uint8_t* table) {
        int8_t even[LANES], odd[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            uint16_t words[2];
            memcpy(words, at + 4 * lane, sizeof words);
            even[lane] = (int8_t)table[words[0] >> 4 * i & 15], odd[lane] = (int8_t)table[words[1] >> 4 * i & 15];
        }
        Pair pair;
        read(pair.even, even);
        read(pair.odd, odd);
        return pair;
    }
    INLINE Pair shifted_int4_pair(Int4Words at, int i) { return int4_pair(at, i); }  // not used: one sum
    INLINE Sum shifted_back(Sum sum, int) { return sum; }
    INLINE Broadcast broadcast(const Row* row, int) { return {row[0], row[1]}; }
    INLINE void add(Sum& sum, Pair weights, Broadcast row) {
        sum = sum + weights.even * row.even + weights.odd * row.odd;
    }
    INLINE Floats floats(Sum sum) { return floats_of(sum); }
};
#endif

struct Bf16 {
    typedef float Row;
    typedef Floats Sum;
    typedef Ints Pair;
    struct Broadcast {
        float even, odd;
    };
    static constexpr int PAIR_BYTES = 64, STEPS = 1;
    static constexpr bool IS_INT8 = false;
    INLINE Sum zero() { return Floats{}; }
    INLINE Pair load(const uint8_t* at, int) {
        Pair pair;
        read(pair, (const int32_t*)at);
        return pair;
    }
    INLINE Broadcast broadcast(const Row* row, int) { return {row[0], row[1]}; }
    INLINE void add(Sum& sum, Pair weights,
                    Broadcast row) {  // products of bfloat16 numbers are exact: no FMA is needed
        sum = sum + from_bits(weights & (int32_t)0xffff0000) * row.odd;
        sum = sum + from_bits(weights << 16) * row.even;
    }
    INLINE Floats floats(Sum sum) { return sum; }
};

constexpr int MAX_ROWS = 4;
constexpr int panels_at_once(int) { return 1; }

}  // namespace BRLITE_ISA
}  // namespace brlite
