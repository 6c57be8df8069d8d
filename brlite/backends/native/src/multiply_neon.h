// The innermost products for Arm processors: see multiply.h for what they compute.
//
//   neon           smlal: 4 products of int16, with weights widened to int16.
//   neon_dotprod   sdot: 16 products of bytes, four inputs of four columns. An activation is two bytes, so that is 8
//                  products. Two pairs of a panel are zipped to four inputs of each column.
//   neon_i8mm      the same with sudot, which multiplies signed by unsigned bytes.
//
// The matrix products smmla and usmmla would need fewer instructions, but also sums of 2 x 2 products, which have to be
// taken apart for each group of 32 inputs. bfdot and bfmmla are rounded in their own way, which other processors lack.
#pragma once

#include "lanes.h"

namespace brlite {
namespace BRLITE_ISA {

typedef Register<int32_t, 4>::Type Quarter;  // sums of four columns

// `add` is asm to fix the order of instructions: GCC would load the rows first, and then has no registers left for the
// sums.
struct Int8 {
    typedef int16_t Row;
    typedef Ints Sum;
    struct Pair {  // of columns 0 to 7 and 8 to 15
        int16x8_t even_low, even_high, odd_low, odd_high;
    };
    typedef const Row* Broadcast;
    static constexpr int PAIR_BYTES = 32, STEPS = 1;
    static constexpr bool IS_INT8 = true;
    INLINE Sum zero() { return Ints{}; }
    INLINE Sum equal(int32_t value) { return splat_int(value); }
    INLINE Sum plus(Sum a, Sum b) { return a + b; }
    INLINE Pair load(const uint8_t* at, int) {
        const int8x16x2_t codes = vld2q_s8((const int8_t*)at);  // even inputs, odd inputs
        return {vmovl_s8(vget_low_s8(codes.val[0])), vmovl_high_s8(codes.val[0]), vmovl_s8(vget_low_s8(codes.val[1])),
                vmovl_high_s8(codes.val[1])};
    }
    typedef const uint8_t* Int4Words;
    INLINE Int4Words load_int4_words(const uint8_t* at) { return at; }
    INLINE Pair int4_pair(Int4Words at, int i) {
        const uint16x8x2_t low = vld2q_u16((const uint16_t*)at), high = vld2q_u16((const uint16_t*)(at + 32));
        const auto codes = [i](uint16x8_t words) INLINED {
            return vreinterpretq_s16_u16(vandq_u16(vshlq_u16(words, vdupq_n_s16((int16_t)(-4 * i))), vdupq_n_u16(15)));
        };
        return {codes(low.val[0]), codes(high.val[0]), codes(low.val[1]), codes(high.val[1])};
    }
    INLINE Pair load_q6_k(const uint8_t* group, int pair) {
        const int vector = q6_k_vector(pair), shift = 8 * q6_k_byte(pair);
        const auto bits = [shift](uint16x8_t words, int by, int mask) INLINED {
            return vandq_u16(vshlq_u16(words, vdupq_n_s16((int16_t)(-shift - by))), vdupq_n_u16((uint16_t)mask));
        };
        uint16x8_t codes[4];  // even and odd inputs of columns 0 to 7, then of columns 8 to 15
        UNROLLED for (int half = 0; half < 2; half++) {
            uint16x8x2_t words[3];
            UNROLLED for (int i = 0; i < 3; i++) words[i] = vld2q_u16((const uint16_t*)(group + 64 * i + 32 * half));
            UNROLLED for (int odd = 0; odd < 2; odd++) {
                const uint16x8_t upper =
                    vorrq_u16(vorrq_u16(bits(words[0].val[odd], 6, 3), bits(words[1].val[odd], 4, 12)),
                              bits(words[2].val[odd], 2, 48));
                codes[2 * half + odd] = vector < 3 ? bits(words[vector % 3].val[odd], 0, 63) : upper;
            }
        }
        return {vreinterpretq_s16_u16(codes[0]), vreinterpretq_s16_u16(codes[2]), vreinterpretq_s16_u16(codes[1]),
                vreinterpretq_s16_u16(codes[3])};
    }
    static constexpr int TABLE_BIAS = 0;
    INLINE Pair load_table(const uint8_t* at, int i, const uint8_t* table) {
        const auto numbers = [table](int16x8_t codes) INLINED {
            const int8x16_t found = vqtbl1q_s8(vld1q_s8((const int8_t*)table), vreinterpretq_u8_s16(codes));
            return vshrq_n_s16(vshlq_n_s16(vreinterpretq_s16_s8(found), 8), 8);  // upper bytes are of code 0
        };
        const Pair codes = int4_pair(at, i);
        return {numbers(codes.even_low), numbers(codes.even_high), numbers(codes.odd_low), numbers(codes.odd_high)};
    }
    INLINE Pair shifted_int4_pair(Int4Words at, int i) { return int4_pair(at, i); }  // not used: one sum
    INLINE Sum shifted_back(Sum sum, int) { return sum; }
    INLINE Broadcast broadcast(const Row* row, int) { return row; }
    INLINE void add(Sum& sum, Pair weights, Broadcast row) {
        int16x8_t pair;
        asm volatile(
            "ldr %s[pair], %[row]\n\t"
            "smlal %[a].4s, %[even_low].4h, %[pair].h[0]\n\t"
            "smlal2 %[b].4s, %[even_low].8h, %[pair].h[0]\n\t"
            "smlal %[c].4s, %[even_high].4h, %[pair].h[0]\n\t"
            "smlal2 %[d].4s, %[even_high].8h, %[pair].h[0]\n\t"
            "smlal %[a].4s, %[odd_low].4h, %[pair].h[1]\n\t"
            "smlal2 %[b].4s, %[odd_low].8h, %[pair].h[1]\n\t"
            "smlal %[c].4s, %[odd_high].4h, %[pair].h[1]\n\t"
            "smlal2 %[d].4s, %[odd_high].8h, %[pair].h[1]"
            : [a] "+w"(sum.low.low), [b] "+w"(sum.low.high), [c] "+w"(sum.high.low), [d] "+w"(sum.high.high),
              [pair] "=&x"(pair)
            : [row] "m"(*(const int32_t (*)[1])row), [even_low] "w"(weights.even_low),
              [even_high] "w"(weights.even_high), [odd_low] "w"(weights.odd_low), [odd_high] "w"(weights.odd_high));
    }
    INLINE Floats floats(Sum sum) { return floats_of(sum); }
};

struct Bf16 {
    typedef float Row;
    typedef Floats Sum;
    typedef Floats Pair;  // the odd inputs in step 0, the even ones in step 1
    typedef const Row* Broadcast;
    static constexpr int PAIR_BYTES = 64, STEPS = 2;
    static constexpr bool IS_INT8 = false;
    INLINE Sum zero() { return Floats{}; }
    INLINE Pair load(const uint8_t* at, int step) {
        Ints words;
        read(words, (const int32_t*)at);
        return from_bits(step == 0 ? words & (int32_t)0xffff0000 : words << 16);
    }
    INLINE Broadcast broadcast(const Row* row, int step) { return row + 1 - step; }
    INLINE void add(Sum& sum, Pair weights, Broadcast row) {
        float32x4_t number;
        asm volatile(
            "ldr %s[number], %[row]\n\t"
            "fmla %[a].4s, %[weights_a].4s, %[number].s[0]\n\t"
            "fmla %[b].4s, %[weights_b].4s, %[number].s[0]\n\t"
            "fmla %[c].4s, %[weights_c].4s, %[number].s[0]\n\t"
            "fmla %[d].4s, %[weights_d].4s, %[number].s[0]"
            : [a] "+w"(sum.low.low), [b] "+w"(sum.low.high), [c] "+w"(sum.high.low), [d] "+w"(sum.high.high),
              [number] "=&w"(number)
            : [row] "m"(*row), [weights_a] "w"(weights.low.low), [weights_b] "w"(weights.low.high),
              [weights_c] "w"(weights.high.low), [weights_d] "w"(weights.high.high));
    }
    INLINE Floats floats(Sum sum) { return sum; }
};

// The sums of a panel take 24 of the 32 registers.
constexpr int MAX_ROWS = 6;
constexpr int panels_at_once(int num_rows) { return num_rows == 1 ? 4 : num_rows == 2 ? 2 : 1; }

#if defined(BRLITE_HAS_DOTPROD)

#if defined(BRLITE_HAS_I8MM)
constexpr bool IS_LOWER_SIGNED = false;
#else
constexpr bool IS_LOWER_SIGNED = true;
#endif

// Four inputs of sixteen columns: four bytes for each column.
struct Quad {
    int8x16_t quarters[4];
};

// Eight activations as bytes: 256 * upper + lower. Where lower has to be signed, it is 128 less.
struct Bytes {
    int8x16_t both;  // eight of `upper`, eight of `lower`

    INLINED void read(const int16_t* row, uint8x16_t order) {
        both = vqtbl1q_s8(vreinterpretq_s8_s16(vld1q_s16(row)), order);
        if (IS_LOWER_SIGNED) both = veorq_s8(both, vcombine_s8(vdup_n_s8(0), vdup_n_s8(-128)));
    }
    template <int HALF>
    INLINED int32x4_t times_upper(int32x4_t sums, int8x16_t codes) const {
        return vdotq_laneq_s32(sums, codes, both, HALF);
    }
    template <int HALF>
    INLINED int32x4_t times_lower(int32x4_t sums, int8x16_t codes) const {
#if defined(BRLITE_HAS_I8MM)
        return vsudotq_laneq_s32(sums, codes, vreinterpretq_u8_s8(both), 2 + HALF);
#else
        return vdotq_laneq_s32(sums, codes, both, 2 + HALF);
#endif
    }
};

// Sums of a few rows times one panel.
template <int ROWS>
struct ByteSums {
    int32x4_t upper[ROWS][4], lower[ROWS][4];
    int32x4_t codes[4];  // sums of codes; if IS_LOWER_SIGNED, added 128 times

    INLINED ByteSums() {
        UNROLLED for (int i = 0; i < 4; i++) {
            UNROLLED for (int r = 0; r < ROWS; r++) upper[r][i] = lower[r][i] = vdupq_n_s32(0);
            codes[i] = vdupq_n_s32(0);
        }
    }

    // Adds the products of four inputs with half of eight activations.
    template <int HALF>
    INLINED void add(const Quad& quad, const Bytes (&rows)[ROWS]) {
        UNROLLED for (int i = 0; i < 4; i++) {
            UNROLLED for (int r = 0; r < ROWS; r++) {
                upper[r][i] = rows[r].template times_upper<HALF>(upper[r][i], quad.quarters[i]);
                lower[r][i] = rows[r].template times_lower<HALF>(lower[r][i], quad.quarters[i]);
            }
            if (IS_LOWER_SIGNED) codes[i] = vdotq_s32(codes[i], quad.quarters[i], vdupq_n_s8(1));
        }
    }

    INLINED Ints of_row(int r) const {
        int32x4_t sums[4];
        UNROLLED for (int i = 0; i < 4; i++) {
            sums[i] = vaddq_s32(vshlq_n_s32(upper[r][i], 8), lower[r][i]);
            if (IS_LOWER_SIGNED) sums[i] = vaddq_s32(sums[i], vshlq_n_s32(codes[i], 7));
        }
        return {{(Quarter)sums[0], (Quarter)sums[1]}, {(Quarter)sums[2], (Quarter)sums[3]}};
    }
};

// A panel of int8 codes: pairs of inputs, `stride` bytes apart.
struct Int8Panel {
    const uint8_t* pairs;
    long stride;

    template <int HALF>
    INLINED Quad quad(int first) const {
        const int16_t* even = (const int16_t*)(pairs + (first / 2 + 2 * HALF) * stride);
        const int16_t* odd = (const int16_t*)((const uint8_t*)even + stride);
        const int16x8_t low = vld1q_s16(even), high = vld1q_s16(even + 8);
        const int16x8_t next_low = vld1q_s16(odd), next_high = vld1q_s16(odd + 8);
        return {{vreinterpretq_s8_s16(vzip1q_s16(low, next_low)), vreinterpretq_s8_s16(vzip2q_s16(low, next_low)),
                 vreinterpretq_s8_s16(vzip1q_s16(high, next_high)), vreinterpretq_s8_s16(vzip2q_s16(high, next_high))}};
    }
    INLINED static uint8x16_t order() { return uint8x16_t{1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14}; }
};

// A group of int4 codes. The two words of a column have inputs 0 2 4 6 and 1 3 5 7 of eight, so the lower halves of
// their bytes are inputs 0 4 1 5, the upper halves 2 6 3 7.
struct Int4Panel {
    const uint8_t* codes;

    template <int HALF>
    INLINED Quad quad(int first) const {
        Quad quad;
        UNROLLED for (int i = 0; i < 4; i++) {
            const uint8x16_t both = vld1q_u8(codes + first / 8 * 64 + 16 * i);
            quad.quarters[i] = vreinterpretq_s8_u8(HALF ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15)));
        }
        return quad;
    }
    INLINED static uint8x16_t order() { return uint8x16_t{1, 9, 3, 11, 5, 13, 7, 15, 0, 8, 2, 10, 4, 12, 6, 14}; }
};

// The same, of a format with a table.
struct TablePanel {
    Int4Panel panel;
    const uint8_t* table;

    template <int HALF>
    INLINED Quad quad(int first) const {
        Quad quad = panel.quad<HALF>(first);
        UNROLLED for (int i = 0; i < 4; i++) quad.quarters[i] =
            vqtbl1q_s8(vld1q_s8((const int8_t*)table), vreinterpretq_u8_s8(quad.quarters[i]));
        return quad;
    }
    INLINED static uint8x16_t order() { return Int4Panel::order(); }
};

// A group of Q6_K codes.
struct Q6KPanel {
    const uint8_t* group;

    template <int HALF>
    INLINED Quad quad(int first) const {
        const int vector = first / 4 + HALF;
        Quad quad;
        UNROLLED for (int i = 0; i < 4; i++) {
            const auto bits = [this, i](int vector, int by, int mask) INLINED {
                const uint8x16_t bytes = vld1q_u8(group + 64 * vector + 16 * i);
                return vandq_u8(vshlq_u8(bytes, vdupq_n_s8((int8_t)-by)), vdupq_n_u8((uint8_t)mask));
            };
            quad.quarters[i] = vreinterpretq_s8_u8(
                vector < 3 ? bits(vector, 0, 63) : vorrq_u8(vorrq_u8(bits(0, 6, 3), bits(1, 4, 12)), bits(2, 2, 48)));
        }
        return quad;
    }
    INLINED static uint8x16_t order() { return Int4Panel::order(); }
};

// sums[row * stride] += `num_inputs` inputs, a multiple of 8, of `rows` times those of a panel.
template <int ROWS, class Panel>
INLINE void add_quads(Ints* sums, int stride, const Panel& panel, const int16_t* rows, long row_stride,
                      int num_inputs) {
    constexpr int SOME = ROWS < 2 ? ROWS : 2;  // their sums, and those of the codes, take 20 of the 32 registers
    ByteSums<SOME> found;
    _Pragma("GCC unroll 1") for (int first = 0; first < num_inputs; first += 8) {
        Bytes bytes[SOME];
        UNROLLED for (int r = 0; r < SOME; r++) bytes[r].read(rows + r * row_stride + first, Panel::order());
        found.template add<0>(panel.template quad<0>(first), bytes);
        found.template add<1>(panel.template quad<1>(first), bytes);
    }
    UNROLLED for (int r = 0; r < SOME; r++) sums[r * stride] = sums[r * stride] + found.of_row(r);
    if constexpr (ROWS > SOME)
        add_quads<ROWS - SOME>(sums + SOME * stride, stride, panel, rows + SOME * row_stride, row_stride, num_inputs);
}

#endif

}  // namespace BRLITE_ISA
}  // namespace brlite
