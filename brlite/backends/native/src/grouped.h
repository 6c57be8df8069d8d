// Products of int8 activations that have one scale for each group of 32 inputs (`GroupedRow`). Sums within a group are
// exact integers, so all instruction sets give the same bits.
//
// With VNNI one instruction multiplies four bytes of activations by four bytes of weights and adds the products. The
// weights are unsigned there: an int8 code becomes code + 128, and sums start at -128 times the sum of the activations.
// A quad has four inputs of all sixteen columns: 64 bytes. Eight inputs of a panel become two quads. Their order of
// inputs needs the fewest instructions for int4 panels, and activations are stored in the same order:
//
//   bytes of an int4 column, each with two inputs:   0, 2 | 4, 6 | 1, 3 | 5, 7
//   lower 4 bits, then upper 4 bits:                 0 4 1 5 and 2 6 3 7
//
// AVX2 and AVX-512 without VNNI multiply unsigned bytes by signed ones, and add pairs of products, in 16 bits. That is
// exact for int4 codes: a column's 32 products are two sums of at most 16 * 15 * 127 = 30480. Of 6-bit codes two quads
// are added, at most 4 * 63 * 127 = 32004, before the sums become 32 bits long. Codes of 8 bits would overflow, and so
// would the numbers of a table.
// Activations are stored twice, since all panels can read the same ones: as int16, multiplied as those with one scale a
// row, and as bytes. The other instruction sets have only the int16 form.
#pragma once

#include "multiply.h"

namespace brlite {
namespace BRLITE_ISA {

// Whether tiles of several rows share the quads of their panels: the first tile writes them, the others read them. That
// saves a sixth to a third of a tile's instructions.
#if defined(BRLITE_HAS_AVX512) && defined(BRLITE_HAS_VNNI)
constexpr bool KEEPS_QUADS = true;
#else
constexpr bool KEEPS_QUADS = false;
#endif
constexpr long quads_bytes(int num_inputs) { return (long)num_inputs * LANES; }

// VNNI's sums start at the bits of 1.5 * 2^23, so that they become floats without an instruction: that number plus the
// sum, exact for sums of up to 2^22.
#if defined(BRLITE_HAS_VNNI)
constexpr int32_t SUM_BIAS_BITS = 0x4b400000;
constexpr float SUM_BIAS = ROUNDING_SHIFT;
static_assert(BRLITE_GROUP * 128 * 127 < 1 << 22, "a group's sum is exact as a float");
#else
constexpr int32_t SUM_BIAS_BITS = 0;
constexpr float SUM_BIAS = 0;
#endif

#if defined(BRLITE_HAS_AVX512)

// Stores the 32 integers of a group in the order of the quads.
INLINE void store_quads(int8_t* to, Ints low, Ints high) {
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(_mm512_cvtepi32_epi8((__m512i)low), order));
    _mm_storeu_si128((__m128i*)(to + LANES), _mm_shuffle_epi8(_mm512_cvtepi32_epi8((__m512i)high), order));
}

#elif defined(BRLITE_HAS_AVX2)

INLINE void store_quads(int8_t* to, Ints low, Ints high) {
    const __m256i bytes = _mm256_packs_epi16(packed(low), packed(high));
    // Of each eight inputs, 0 to 3 are in the lower half and 4 to 7 in the upper.
    const __m128i of_0 = _mm256_castsi256_si128(bytes), of_4 = _mm256_extracti128_si256(bytes, 1);
    _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi8(of_0, of_4));
    _mm_storeu_si128((__m128i*)to + 1, _mm_unpackhi_epi8(of_0, of_4));
}

#endif

#if defined(BRLITE_HAS_AVX512) && defined(BRLITE_HAS_VNNI)

constexpr int sums_of_grouped_row(int num_rows) { return num_rows == 1 ? 4 : 2; }

// The two quads of inputs `first` to `first + 7` of a panel's group.
template <int FORMAT>
INLINE void load_quads(Int8::Pair& first_quad, Int8::Pair& second_quad, const uint8_t* group, int first,
                       const uint8_t* table) {
    Int8::Pair* const quads[2] = {&first_quad, &second_quad};
    if constexpr (FORMAT == BRLITE_Q6_K) {
        UNROLLED for (int i = 0; i < 2; i++) * quads[i] = Int8::q6_k_codes(group, first / 4 + i);
        return;
    }
    if constexpr (code_bits(FORMAT) == 4) {
        Int8::Pair bytes = Int8::load_bytes(group + first * LANES / 2);
        asm("" : "+v"(bytes));
        UNROLLED for (int i = 0; i < 2; i++) {
            *quads[i] = Int8::int4_codes(bytes, i);
            if constexpr (has_table(FORMAT)) *quads[i] = Int8::look_up(table, *quads[i]);
        }
        return;
    }
    __m512i pairs_0_1 = _mm512_loadu_si512(group + first * LANES),
            pairs_2_3 = _mm512_loadu_si512(group + first * LANES + 64);
    asm("" : "+v"(pairs_0_1), "+v"(pairs_2_3));  // GCC would load them twice
    const __m512i low = _mm512_unpacklo_epi8(pairs_0_1, pairs_2_3), high = _mm512_unpackhi_epi8(pairs_0_1, pairs_2_3);
    const __m512i of_first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  of_second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), plus_128 = _mm512_set1_epi8(-128);
    first_quad = _mm512_xor_si512(_mm512_permutex2var_epi64(low, of_first, high), plus_128);
    second_quad = _mm512_xor_si512(_mm512_permutex2var_epi64(low, of_second, high), plus_128);
}

// sums[panel] += the quad of a row times those of the panels.
template <int PANELS>
INLINE void add_quad(Int8::Sum (&sums)[PANELS], const Int8::Pair (&quads)[PANELS], const int8_t* row) {
    const __m512i inputs = broadcast_4_bytes(row);
    UNROLLED for (int p = 0; p < PANELS; p++)  // asm: the intrinsic makes GCC copy sums
        asm volatile(
            "vpdpbusd %[row], %[quad], %[sum]" : [sum] "+v"(sums[p]) : [quad] "v"(quads[p]), [row] "v"(inputs));
}

#elif defined(BRLITE_HAS_AVX2) && defined(BRLITE_HAS_VNNI)

constexpr int sums_of_grouped_row(int num_rows) { return num_rows == 1 ? 4 : num_rows == 2 ? 2 : 1; }

template <int FORMAT>
INLINE void load_quads(Int8::Pair& first_quad, Int8::Pair& second_quad, const uint8_t* group, int first,
                       const uint8_t* table) {
    Int8::Pair* const quads[2] = {&first_quad, &second_quad};
    if constexpr (FORMAT == BRLITE_Q6_K) {
        UNROLLED for (int i = 0; i < 2; i++) * quads[i] = Int8::q6_k_codes(group, first / 4 + i);
        return;
    }
    if constexpr (code_bits(FORMAT) == 4) {
        const Int8::Pair bytes = Int8::load_bytes(group + first * LANES / 2);
        UNROLLED for (int i = 0; i < 2; i++) {
            *quads[i] = Int8::int4_codes(bytes, i);
            if constexpr (has_table(FORMAT)) *quads[i] = Int8::look_up(table, *quads[i]);
        }
        return;
    }
    const __m256i plus_128 = _mm256_set1_epi8(-128);
    const __m256i* pairs = (const __m256i*)(group + first * LANES);
    UNROLLED for (int i = 0; i < 2; i++) {
        const __m256i pair = _mm256_loadu_si256(pairs + i), later = _mm256_loadu_si256(pairs + 2 + i);
        const __m256i low = _mm256_unpacklo_epi8(pair, later), high = _mm256_unpackhi_epi8(pair, later);
        *quads[i] = {_mm256_xor_si256(_mm256_permute2x128_si256(low, high, 0x20), plus_128),
                     _mm256_xor_si256(_mm256_permute2x128_si256(low, high, 0x31), plus_128)};
    }
}

INLINE void add_quad(Int8::Sum (&sums)[1], const Int8::Pair (&quads)[1], const int8_t* row) {
    __m256i inputs;
    asm volatile("vpbroadcastd %[row], %[inputs]\n\t" BRLITE_VNNI
                 "vpdpbusd %[inputs], %[low], %[low_sum]\n\t" BRLITE_VNNI "vpdpbusd %[inputs], %[high], %[high_sum]"
                 : [low_sum] "+x"(sums[0].low), [high_sum] "+x"(sums[0].high), [inputs] "=&x"(inputs)
                 : [row] "m"(*(const int32_t (*)[1])row), [low] "x"(quads[0].low), [high] "x"(quads[0].high));
}

#endif

#if defined(BRLITE_HAS_VNNI)

typedef int8_t GroupedRow;

#if defined(BRLITE_HAS_AVX512)
INLINE Floats as_floats(Int8::Sum sum) { return (Floats)sum; }
#else
INLINE Floats as_floats(Int8::Sum sum) { return {(__m256)sum.low, (__m256)sum.high}; }
#endif

INLINE void store_group(GroupedRow* to, Ints low, Ints high) { store_quads(to, low, high); }

// What the sum of a group starts at.
template <int FORMAT>
INLINE Int8::Sum start_of(const ActivationGroup& activations, int half) {
    if constexpr (has_offsets(FORMAT)) return Int8::equal(SUM_BIAS_BITS);
    if constexpr (FORMAT == BRLITE_INT4) return Int8::equal(activations.minus_8_sums);
    return Int8::equal(FORMAT == BRLITE_Q6_K ? activations.minus_32_sums[half] : activations.minus_128_sums);
}

// As `sum_integers`, with SUM_BIAS added. `rows` begin with the group of activations. `quads_of` is where each panel's
// quads are, with HAS_QUADS, or are to be written, if this tile `keeps` them.
template <int FORMAT, bool HAS_QUADS, int ROWS, int PANELS>
INLINE void sum_group(Floats (&sums)[ROWS][PANELS], const uint8_t* const (&groups)[PANELS],
                      uint8_t* const (&quads_of)[PANELS], bool keeps, const GroupedRow* rows, long row_size,
                      const GroupOfRows& activations, int half, const uint8_t* table) {
    constexpr int SUMS = PANELS > 1 ? 1 : sums_of_grouped_row(ROWS);
    constexpr int PAIRS = pairs_of_line(FORMAT, ROWS);
    const uint8_t* ahead = groups[0] + FETCH_AHEAD_BESIDE;
    FetchBeside<PAIRS> beside{ahead};
    Int8::Sum parts[SUMS][ROWS][PANELS];
    UNROLLED for (int r = 0; r < ROWS; r++) UNROLLED for (int p = 0; p < PANELS; p++) {
        parts[0][r][p] = start_of<FORMAT>(activations[r], half);
        UNROLLED for (int i = 1; i < SUMS; i++) parts[i][r][p] = Int8::zero();
    }
    UNROLLED for (int first = 0; first < group_inputs(FORMAT); first += 8) {
        Int8::Pair quads[2][PANELS];
        UNROLLED for (int p = 0; p < PANELS; p++) {
            const auto kept = [&](int k) INLINED { return quads_of[p] + (first + 4 * k) * LANES; };
            if (!HAS_QUADS) load_quads<FORMAT>(quads[0][p], quads[1][p], groups[p], first, table);
            UNROLLED for (int k = 0; k < 2; k++) {
                if (HAS_QUADS) memcpy(&quads[k][p], kept(k), sizeof quads[k][p]);
                if (!HAS_QUADS && KEEPS_QUADS && PANELS > 1 && keeps) memcpy(kept(k), &quads[k][p], sizeof quads[k][p]);
            }
        }
        const GroupedRow* inputs = rows + half * group_inputs(FORMAT) + first;
        UNROLLED for (int k = 0; k < 2; k++) UNROLLED for (int r = 0; r < ROWS; r++)
            add_quad(parts[(first / 4 + k) % SUMS][r], quads[k], inputs + r * row_size + 4 * k);
        UNROLLED for (int pair = 0; pair < 4; pair++) beside(pair);
    }
    if constexpr (PAIRS != 0) fetch_line(ahead + code_bytes(FORMAT));
    UNROLLED for (int r = 0; r < ROWS; r++) UNROLLED for (int p = 0; p < PANELS; p++) {
        UNROLLED for (int i = 1; i < SUMS; i++) parts[0][r][p] = Int8::plus(parts[0][r][p], parts[i][r][p]);
        sums[r][p] = as_floats(parts[0][r][p]);
    }
}

#elif defined(BRLITE_HAS_AVX512) || defined(BRLITE_HAS_AVX2)

// The space of one input. A group is 32 integers as int16, then the same as bytes in the order of the quads.
struct GroupedRow {
    uint8_t bytes[3];
};
static_assert(sizeof(GroupedRow) <= sizeof(Bf16::Row), "rows of bf16 and of int8 activations share their memory");

INLINE void store_group(GroupedRow* to, Ints low, Ints high) {
    write_int16((int16_t*)to, low);
    write_int16((int16_t*)to + LANES, high);
    store_quads((int8_t*)((int16_t*)to + BRLITE_GROUP), low, high);
}

static_assert(BRLITE_GROUP / 2 * 15 * 127 <= INT16_MAX, "sums of int4 codes times int8 activations are exact");
static_assert(2 * 2 * 63 * 127 <= INT16_MAX, "sums of two quads of 6-bit codes are exact");

// Words: 16-bit sums, two for each column, each of the products of half a group.
#if defined(BRLITE_HAS_AVX512)
typedef __m512i Words;
INLINE Words product(Int8::Pair quad, const int8_t* row) { return _mm512_maddubs_epi16(quad, broadcast_4_bytes(row)); }
INLINE void add_quad(Words& sum, Int8::Pair quad, const int8_t* row) {
    sum = _mm512_add_epi16(sum, product(quad, row));
}
INLINE Int8::Sum sum_words(Words words) { return _mm512_madd_epi16(words, _mm512_set1_epi16(1)); }
#else
struct Words {
    __m256i low, high;
};
// asm fixes the order of instructions, as in `Int8::add`.
INLINE Words product(Int8::Pair quad, const int8_t* row) {
    Words words;
    asm volatile(
        "vpbroadcastd %[row], %[high]\n\t"
        "vpmaddubsw %[high], %[low_quad], %[low]\n\t"
        "vpmaddubsw %[high], %[high_quad], %[high]"
        : [low] "=&x"(words.low), [high] "=&x"(words.high)
        : [row] "m"(*(const int32_t (*)[1])row), [low_quad] "x"(quad.low), [high_quad] "x"(quad.high));
    return words;
}
INLINE void add_quad(Words& sum, Int8::Pair quad, const int8_t* row) {
    __m256i inputs, product;
    asm volatile(
        "vpbroadcastd %[row], %[inputs]\n\t"
        "vpmaddubsw %[inputs], %[low], %[product]\n\t"
        "vpmaddubsw %[inputs], %[high], %[inputs]\n\t"
        "vpaddw %[product], %[low_sum], %[low_sum]\n\t"
        "vpaddw %[inputs], %[high_sum], %[high_sum]"
        : [low_sum] "+x"(sum.low), [high_sum] "+x"(sum.high), [inputs] "=&x"(inputs), [product] "=&x"(product)
        : [row] "m"(*(const int32_t (*)[1])row), [low] "x"(quad.low), [high] "x"(quad.high));
}
INLINE Int8::Sum sum_words(Words words) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(words.low, ones), _mm256_madd_epi16(words.high, ones)};
}
#endif

template <int FORMAT, int ROWS, int PANELS>
INLINE void sum_int4_group(Floats (&sums)[ROWS][PANELS], const uint8_t* const (&groups)[PANELS], const int8_t* rows,
                           long row_stride, const GroupOfRows& activations) {
    Words words[ROWS][PANELS];
    UNROLLED for (int i = 0; i < BRLITE_GROUP; i += 8) {
        Int8::Pair bytes[PANELS];
        UNROLLED for (int p = 0; p < PANELS; p++) bytes[p] = Int8::load_bytes(groups[p] + i * LANES / 2);
        UNROLLED for (int k = 0; k < 2; k++) {
            Int8::Pair quads[PANELS];
            UNROLLED for (int p = 0; p < PANELS; p++) quads[p] = Int8::int4_codes(bytes[p], k);
            UNROLLED for (int r = 0; r < ROWS; r++) UNROLLED for (int p = 0; p < PANELS; p++) {
                const int8_t* inputs = rows + r * row_stride + i + 4 * k;
                if (i + k == 0)
                    words[r][p] = product(quads[p], inputs);
                else
                    add_quad(words[r][p], quads[p], inputs);
            }
        }
    }
    UNROLLED for (int r = 0; r < ROWS; r++) UNROLLED for (int p = 0; p < PANELS; p++) {
        Int8::Sum sum = sum_words(words[r][p]);
        if (FORMAT == BRLITE_INT4) sum = Int8::plus(sum, Int8::equal(activations[r].minus_8_sums));
        sums[r][p] = Int8::floats(sum);
    }
}

template <int ROWS, int PANELS>
INLINE void sum_q6_k_group(Floats (&sums)[ROWS][PANELS], const uint8_t* const (&groups)[PANELS], const int8_t* rows,
                           long row_stride, const GroupOfRows& activations, int half) {
    UNROLLED for (int p = 0; p < PANELS; p++) {
        Int8::Pair quads[4];
        UNROLLED for (int i = 0; i < 4; i++) quads[i] = Int8::q6_k_codes(groups[p], i);
        UNROLLED for (int r = 0; r < ROWS; r++) {
            Int8::Sum sum = Int8::equal(activations[r].minus_32_sums[half]);
            UNROLLED for (int i = 0; i < 4; i += 2) {
                Words words = product(quads[i], rows + r * row_stride + 4 * i);
                add_quad(words, quads[i + 1], rows + r * row_stride + 4 * i + 4);
                sum = Int8::plus(sum, sum_words(words));
            }
            sums[r][p] = Int8::floats(sum);
        }
    }
}

template <int FORMAT, bool, int ROWS, int PANELS>
INLINE void sum_group(Floats (&sums)[ROWS][PANELS], const uint8_t* const (&groups)[PANELS], uint8_t* const (&)[PANELS],
                      bool, const GroupedRow* rows, long row_size, const GroupOfRows& activations, int half,
                      const uint8_t* table) {
    const int16_t* integers = (const int16_t*)rows;
    const long row_bytes = row_size * sizeof *rows;
    if constexpr (is_int4(FORMAT)) {
        sum_int4_group<FORMAT>(sums, groups, (const int8_t*)(integers + BRLITE_GROUP), row_bytes, activations);
    } else if constexpr (FORMAT == BRLITE_Q6_K) {
        const int8_t* bytes = (const int8_t*)(integers + BRLITE_GROUP) + half * group_inputs(FORMAT);
        sum_q6_k_group(sums, groups, bytes, row_bytes, activations, half);
    } else {
        sum_integers<FORMAT>(sums, groups, integers + half * group_inputs(FORMAT), row_bytes / (long)sizeof *integers,
                             activations, half, table);
    }
}

#else

typedef int16_t GroupedRow;

INLINE void store_group(GroupedRow* to, Ints low, Ints high) {
    write(to, low);
    write(to + LANES, high);
}

template <int FORMAT, bool, int ROWS, int PANELS>
INLINE void sum_group(Floats (&sums)[ROWS][PANELS], const uint8_t* const (&groups)[PANELS], uint8_t* const (&)[PANELS],
                      bool, const GroupedRow* rows, long row_size, const GroupOfRows& activations, int half,
                      const uint8_t* table) {
    sum_integers<FORMAT>(sums, groups, rows + half * group_inputs(FORMAT), row_size, activations, half, table);
}

#endif

}  // namespace BRLITE_ISA
}  // namespace brlite
