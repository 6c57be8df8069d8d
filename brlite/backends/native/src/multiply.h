// The innermost products of LINEAR and ATTEND: a few rows of activations times panels of sixteen columns.
//
//   panel, one pair of inputs (k, k+1):    | n0:k n0:k+1 | n1:k n1:k+1 | … | n15:k n15:k+1 |
//   row of activations:                    … | a[k] a[k+1] | …             broadcast to all sixteen columns
//
// A pair of inputs for all sixteen columns takes 32 bytes in int8 and 64 in bfloat16. In int4 four pairs share 64
// bytes: each 16-bit word has one code of each pair, the first pair's in the lowest 4 bits. In Q6_K eight pairs share
// 192 bytes (step.h). With instructions that multiply pairs, a pair takes one instruction per row and panel. Weights,
// cached keys and cached values all have this form, so there is one kernel for each number format. bfloat16 products
// are added one by one, the odd input first: vdpbf16ps adds in that order, so all instruction sets give its bits.
#pragma once

#include "lanes.h"
#if defined(BRLITE_HAS_NEON)
#include "multiply_neon.h"
#elif !defined(BRLITE_HAS_AVX2) && !defined(BRLITE_HAS_AVX512)
#include "multiply_generic.h"
#endif

namespace brlite {
namespace BRLITE_ISA {

// ---- what each instruction set has -------------------------------------------------------------------------------

#if defined(BRLITE_HAS_AVX512)

// Activations are broadcast to a register once for all panels of a tile. As an operand in memory of each product, they
// are loaded for each, and an Ice Lake loads one vector of 64 bytes a cycle, but multiplies two.
INLINE __m512i broadcast_4_bytes(const void* from) {
    int32_t bytes;
    memcpy(&bytes, from, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

struct Int8 {
    typedef int16_t Row;
    typedef __m512i Sum;
    typedef __m512i Pair;
    static constexpr int PAIR_BYTES = 32, STEPS = 1;
    static constexpr bool IS_INT8 = true;
    INLINE Sum zero() { return _mm512_setzero_si512(); }
    INLINE Sum equal(int32_t value) { return _mm512_set1_epi32(value); }
    INLINE Sum plus(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
    INLINE Pair load(const uint8_t* at, int) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)at)); }
    typedef __m512i Int4Words;
    INLINE Int4Words load_int4_words(const uint8_t* at) {  // asm: GCC would load them again for each operation on them
        __m512i words = _mm512_loadu_si512(at);
        asm("" : "+v"(words));
        return words;
    }
    INLINE Pair int4_pair(Int4Words words, int i) {
        const __m512i codes = _mm512_srli_epi16(words, 4 * i);
        return i == 3 ? codes : _mm512_and_si512(codes, _mm512_set1_epi16(15));
    }
    INLINE Pair shifted_int4_pair(Int4Words words, int i) {
        return i == 3 ? _mm512_srli_epi16(words, 12) : _mm512_and_si512(words, _mm512_set1_epi16(15 << 4 * i));
    }
    INLINE Sum shifted_back(Sum sum, int i) { return _mm512_srai_epi32(sum, 4 * i); }
    INLINE Pair q6_k_codes(const uint8_t* group, int vector) {
        const auto bits = [group](int vector, int by, int mask) INLINED {
            return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(group + 64 * vector), by),
                                    _mm512_set1_epi8((char)mask));
        };
        if (vector < 3) return bits(vector, 0, 63);
        return _mm512_or_si512(_mm512_or_si512(bits(0, 6, 3), bits(1, 4, 12)), bits(2, 2, 48));
    }
    INLINE Pair load_q6_k(const uint8_t* group, int pair) {
        const Pair codes = q6_k_codes(group, q6_k_vector(pair));
        return q6_k_byte(pair) ? _mm512_srli_epi16(codes, 8) : _mm512_and_si512(codes, _mm512_set1_epi16(255));
    }
    static constexpr int TABLE_BIAS = 128;
    INLINE Pair load_bytes(const uint8_t* at) { return _mm512_loadu_si512(at); }
    INLINE Pair int4_codes(Pair bytes, bool is_upper) {
        return _mm512_and_si512(is_upper ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
    }
    INLINE Pair look_up(const uint8_t* table, Pair codes) {
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), codes);
    }
    INLINE Pair load_table(const uint8_t* at, int i, const uint8_t* table) {
        const Pair numbers = look_up(table, int4_codes(load_bytes(at), i % 2));
        return i >= 2 ? _mm512_srli_epi16(numbers, 8) : _mm512_and_si512(numbers, _mm512_set1_epi16(255));
    }
    typedef __m512i Broadcast;
    INLINE Broadcast broadcast(const Row* row, int) { return broadcast_4_bytes(row); }
#if defined(BRLITE_HAS_VNNI)
    INLINE void add(Sum& sum, Pair weights, Broadcast row) {  // asm: the intrinsic makes GCC copy sums
        asm volatile("vpdpwssd %[row], %[weights], %[sum]" : [sum] "+v"(sum) : [weights] "v"(weights), [row] "v"(row));
    }
#else
    INLINE void add(Sum& sum, Pair weights, Broadcast row) {
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(weights, row));
    }
#endif
    INLINE Floats floats(Sum sum) { return floats_of((Ints)sum); }
};

struct Bf16 {
    typedef __m512 Sum;
    typedef __m512i Pair;
    static constexpr int PAIR_BYTES = 64;
    static constexpr bool IS_INT8 = false;
    INLINE Sum zero() { return _mm512_setzero_ps(); }
    INLINE Floats floats(Sum sum) { return (Floats)sum; }
#if defined(BRLITE_HAS_BF16)
    typedef uint16_t Row;
    typedef __m512i Broadcast;
    static constexpr int STEPS = 1;
    INLINE Pair load(const uint8_t* at, int) { return _mm512_loadu_si512(at); }
    INLINE Broadcast broadcast(const Row* row, int) { return broadcast_4_bytes(row); }
    INLINE void add(Sum& sum, Pair weights, Broadcast row) {
        asm volatile("vdpbf16ps %[row], %[weights], %[sum]" : [sum] "+v"(sum) : [weights] "v"(weights), [row] "v"(row));
    }
#else
    typedef float Row;
    typedef __m512 Broadcast;
    static constexpr int STEPS = 2;  // the odd inputs, then the even ones
    INLINE Pair load(const uint8_t* at, int step) {
        const __m512i pairs = _mm512_loadu_si512(at);
        if (step == 0) return _mm512_and_si512(pairs, _mm512_set1_epi32((int32_t)0xffff0000));
        return _mm512_slli_epi32(pairs, 16);
    }
    INLINE Broadcast broadcast(const Row* row, int step) { return _mm512_set1_ps(row[1 - step]); }
    INLINE void add(Sum& sum, Pair weights, Broadcast row) {  // asm: GCC would copy sums
        asm volatile("vfmadd231ps %[row], %[weights], %[sum]"
                     : [sum] "+v"(sum)
                     : [weights] "v"(weights), [row] "v"(row));
    }
#endif
};

constexpr int MAX_ROWS = 6;
constexpr int panels_at_once(int num_rows) { return num_rows <= 3 ? 4 : 2; }

#elif defined(BRLITE_HAS_AVX2)

// `add` is asm to fix the order of instructions: GCC would load the pairs of all rows first, and then has no registers
// left for the sums.
struct Int8 {
    typedef int16_t Row;
    struct Sum {
        __m256i low, high;
    };
    typedef Sum Pair;
    typedef const Row* Broadcast;
    static constexpr int PAIR_BYTES = 32, STEPS = 1;
    static constexpr bool IS_INT8 = true;
    INLINE Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    INLINE Sum equal(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
    INLINE Sum plus(Sum a, Sum b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
    INLINE Pair load(const uint8_t* at, int) {
        return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at)),
                _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(at + 16)))};
    }
    typedef const uint8_t* Int4Words;
    INLINE Int4Words load_int4_words(const uint8_t* at) { return at; }
    INLINE Pair int4_pair(Int4Words at, int i) {
        const __m256i low = _mm256_loadu_si256((const __m256i*)at),
                      high = _mm256_loadu_si256((const __m256i*)(at + 32));
        const __m256i code = _mm256_set1_epi16(15);
        const Pair words = {_mm256_srli_epi16(low, 4 * i), _mm256_srli_epi16(high, 4 * i)};
        if (i == 3) return words;
        return {_mm256_and_si256(words.low, code), _mm256_and_si256(words.high, code)};
    }
    INLINE Pair shifted_int4_pair(Int4Words at, int i) {
        const __m256i low = _mm256_loadu_si256((const __m256i*)at),
                      high = _mm256_loadu_si256((const __m256i*)(at + 32));
        if (i == 3) return {_mm256_srli_epi16(low, 12), _mm256_srli_epi16(high, 12)};
        const __m256i code = _mm256_set1_epi16(15 << 4 * i);
        return {_mm256_and_si256(low, code), _mm256_and_si256(high, code)};
    }
    INLINE Sum shifted_back(Sum sum, int i) {
        return {_mm256_srai_epi32(sum.low, 4 * i), _mm256_srai_epi32(sum.high, 4 * i)};
    }
    INLINE Pair q6_k_codes(const uint8_t* group, int vector) {
        const auto half = [vector](const uint8_t* group) INLINED {
            const auto bits = [group](int vector, int by, int mask) INLINED {
                const __m256i bytes = _mm256_loadu_si256((const __m256i*)(group + 64 * vector));
                return _mm256_and_si256(_mm256_srli_epi16(bytes, by), _mm256_set1_epi8((char)mask));
            };
            if (vector < 3) return bits(vector, 0, 63);
            return _mm256_or_si256(_mm256_or_si256(bits(0, 6, 3), bits(1, 4, 12)), bits(2, 2, 48));
        };
        return {half(group), half(group + 32)};
    }
    INLINE Pair load_q6_k(const uint8_t* group, int pair) {
        const Pair codes = q6_k_codes(group, q6_k_vector(pair));
        if (q6_k_byte(pair)) return {_mm256_srli_epi16(codes.low, 8), _mm256_srli_epi16(codes.high, 8)};
        const __m256i lower = _mm256_set1_epi16(255);
        return {_mm256_and_si256(codes.low, lower), _mm256_and_si256(codes.high, lower)};
    }
    static constexpr int TABLE_BIAS = 128;
    INLINE Pair load_bytes(const uint8_t* at) {
        return {_mm256_loadu_si256((const __m256i*)at), _mm256_loadu_si256((const __m256i*)(at + 32))};
    }
    INLINE Pair int4_codes(Pair bytes, bool is_upper) {
        const __m256i code = _mm256_set1_epi8(15);
        if (is_upper) bytes = {_mm256_srli_epi16(bytes.low, 4), _mm256_srli_epi16(bytes.high, 4)};
        return {_mm256_and_si256(bytes.low, code), _mm256_and_si256(bytes.high, code)};
    }
    INLINE Pair look_up(const uint8_t* table, Pair codes) {
        const __m256i numbers = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table));
        return {_mm256_shuffle_epi8(numbers, codes.low), _mm256_shuffle_epi8(numbers, codes.high)};
    }
    INLINE Pair load_table(const uint8_t* at, int i, const uint8_t* table) {
        const Pair numbers = look_up(table, int4_codes(load_bytes(at), i % 2));
        const __m256i lower = _mm256_set1_epi16(255);
        if (i >= 2) return {_mm256_srli_epi16(numbers.low, 8), _mm256_srli_epi16(numbers.high, 8)};
        return {_mm256_and_si256(numbers.low, lower), _mm256_and_si256(numbers.high, lower)};
    }
    INLINE Broadcast broadcast(const Row* row, int) { return row; }
#if defined(BRLITE_HAS_VNNI)
    INLINE void add(Sum& sum, Pair weights, Broadcast row) {
        __m256i pair;
        asm volatile("vpbroadcastd %[row], %[pair]\n\t" BRLITE_VNNI
                     "vpdpwssd %[pair], %[low], %[low_sum]\n\t" BRLITE_VNNI "vpdpwssd %[pair], %[high], %[high_sum]"
                     : [low_sum] "+x"(sum.low), [high_sum] "+x"(sum.high), [pair] "=&x"(pair)
                     : [row] "m"(*(const int32_t (*)[1])row), [low] "x"(weights.low), [high] "x"(weights.high));
    }
#else
    INLINE void add(Sum& sum, Pair weights, Broadcast row) {
        __m256i pair, product;
        asm volatile(
            "vpbroadcastd %[row], %[pair]\n\t"
            "vpmaddwd %[pair], %[low], %[product]\n\t"
            "vpmaddwd %[pair], %[high], %[pair]\n\t"
            "vpaddd %[product], %[low_sum], %[low_sum]\n\t"
            "vpaddd %[pair], %[high_sum], %[high_sum]"
            : [low_sum] "+x"(sum.low), [high_sum] "+x"(sum.high), [pair] "=&x"(pair), [product] "=&x"(product)
            : [row] "m"(*(const int32_t (*)[1])row), [low] "x"(weights.low), [high] "x"(weights.high));
    }
#endif
    INLINE Floats floats(Sum sum) { return {_mm256_cvtepi32_ps(sum.low), _mm256_cvtepi32_ps(sum.high)}; }
};

struct Bf16 {
    typedef float Row;
    struct Sum {
        __m256 low, high;
    };
    typedef Sum Pair;
    typedef const Row* Broadcast;
    static constexpr int PAIR_BYTES = 64, STEPS = 2;
    static constexpr bool IS_INT8 = false;
    INLINE Sum zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    INLINE Pair load(const uint8_t* at, int step) {
        const __m256i low = _mm256_loadu_si256((const __m256i*)at),
                      high = _mm256_loadu_si256((const __m256i*)(at + 32));
        const __m256i upper = _mm256_set1_epi32((int32_t)0xffff0000);
        if (step == 0) return {(__m256)_mm256_and_si256(low, upper), (__m256)_mm256_and_si256(high, upper)};
        return {(__m256)_mm256_slli_epi32(low, 16), (__m256)_mm256_slli_epi32(high, 16)};
    }
    INLINE Broadcast broadcast(const Row* row, int step) { return row + 1 - step; }
    INLINE void add(Sum& sum, Pair weights, Broadcast row) {
        __m256 number;
        asm volatile(
            "vbroadcastss %[row], %[number]\n\t"
            "vfmadd231ps %[number], %[low], %[low_sum]\n\t"
            "vfmadd231ps %[number], %[high], %[high_sum]"
            : [low_sum] "+x"(sum.low), [high_sum] "+x"(sum.high), [number] "=&x"(number)
            : [row] "m"(*row), [low] "x"(weights.low), [high] "x"(weights.high));
    }
    INLINE Floats floats(Sum sum) { return {sum.low, sum.high}; }
};

// The sums of a panel take 12 of the 16 registers.
constexpr int MAX_ROWS = 6;
constexpr int panels_at_once(int num_rows) { return num_rows == 1 ? 4 : num_rows == 2 ? 2 : 1; }

#endif

// ---- what they are used for --------------------------------------------------------------------------------------

// The table of a format, if it has one, as `look_up` wants it: plus TABLE_BIAS, which makes bytes unsigned where that
// takes fewer instructions. Sums then start at -TABLE_BIAS times the sum of the activations.
struct Table {
    alignas(NUM_CODES) uint8_t bytes[NUM_CODES];
    constexpr Table(const int8_t (&numbers)[NUM_CODES]) : bytes() {
        for (int i = 0; i < NUM_CODES; i++) bytes[i] = (uint8_t)(numbers[i] + Int8::TABLE_BIAS);
    }
};
static constexpr Table IQ4_TABLE = IQ4_NUMBERS, E2M1_TABLE = E2M1_NUMBERS;
static_assert(Int8::TABLE_BIAS == 0 || Int8::TABLE_BIAS == 128, "sums start at minus_128_sums");
INLINE const uint8_t* table_of(int format) {
    return !has_table(format) ? nullptr : format == BRLITE_MXFP4 ? E2M1_TABLE.bytes : IQ4_TABLE.bytes;
}

struct NothingBeside {
    INLINED void operator()(int) const {}
};

// sums[pair % SUMS][row][panel] += `num_pairs` pairs, a multiple of 4, of `rows` with those of `panels`. `beside(i)` is
// called between them, after pair i of each four: for work of units that do not multiply, which costs no time there.
template <class Kind, int SUMS, int ROWS, int PANELS, class Beside = NothingBeside>
INLINE void add_pairs(typename Kind::Sum (&sums)[SUMS][ROWS][PANELS], const uint8_t* const (&panels)[PANELS],
                      long pair_stride, const typename Kind::Row* rows, long row_stride, int num_pairs,
                      Beside beside = {}) {
#if defined(BRLITE_HAS_DOTPROD)
    if constexpr (Kind::IS_INT8) {
        UNROLLED for (int p = 0; p < PANELS; p++)
            add_quads<ROWS>(&sums[0][0][p], PANELS, Int8Panel{panels[p], pair_stride}, rows, row_stride, 2 * num_pairs);
        return;
    }
#endif
    _Pragma("GCC unroll 1") for (int first = 0; first < num_pairs; first += 4) {
        UNROLLED for (int i = 0; i < 4 * Kind::STEPS; i++) {
            const int pair = first + i / Kind::STEPS, step = i % Kind::STEPS;
            typename Kind::Pair weights[PANELS];
            UNROLLED for (int p = 0; p < PANELS; p++) weights[p] = Kind::load(panels[p] + pair * pair_stride, step);
            UNROLLED for (int r = 0; r < ROWS; r++) {
                typename Kind::Broadcast row = Kind::broadcast(rows + r * row_stride + 2 * pair, step);
                UNROLLED for (int p = 0; p < PANELS; p++)
                    Kind::add(sums[i / Kind::STEPS % SUMS][r][p], weights[p], row);
            }
            if (step == Kind::STEPS - 1) beside(i / Kind::STEPS);
        }
    }
}

template <class Kind, int ROWS, int PANELS>
INLINE void clear(typename Kind::Sum (&sums)[ROWS][PANELS]) {
    UNROLLED for (int r = 0; r < ROWS; r++) UNROLLED for (int p = 0; p < PANELS; p++) sums[r][p] = Kind::zero();
}

// sums[row][panel] += one pair of `rows` times the pair of weights that `load` gives of each panel.
template <int ROWS, int PANELS, class Load>
INLINE void add_pair(Int8::Sum (&sums)[ROWS][PANELS], const Int8::Row* rows, long row_stride, Load load) {
    Int8::Pair weights[PANELS];
    UNROLLED for (int p = 0; p < PANELS; p++) weights[p] = load(p);
    UNROLLED for (int r = 0; r < ROWS; r++) {
        const Int8::Broadcast row = Int8::broadcast(rows + r * row_stride, 0);
        UNROLLED for (int p = 0; p < PANELS; p++) Int8::add(sums[r][p], weights[p], row);
    }
}

// As `add_pairs`, for one group of an int4 panel. With three sums or more, codes are not shifted down: those in the
// second and third 4 bits of a word count 16 and 256 times, go to a sum of their own, and the sum is shifted once a
// group. That takes half the instructions.
template <int SUMS, int ROWS, int PANELS, class Beside>
INLINE void add_int4_pairs(Int8::Sum (&sums)[SUMS][ROWS][PANELS], const uint8_t* const (&panels)[PANELS],
                           const Int8::Row* rows, long row_stride, Beside beside) {
#if defined(BRLITE_HAS_DOTPROD)
    return add_quads<ROWS>(&sums[0][0][0], 1, Int4Panel{panels[0]}, rows, row_stride, BRLITE_GROUP);
#endif
    _Pragma("GCC unroll 1") for (int first = 0; first < BRLITE_GROUP / 2; first += 4) {
        Int8::Int4Words words[PANELS];
        UNROLLED for (int p = 0; p < PANELS; p++) words[p] = Int8::load_int4_words(panels[p] + first * LANES);
        UNROLLED for (int i = 0; i < 4; i++) {
            add_pair(sums[i % SUMS], rows + 2 * (first + i), row_stride, [&](int p) INLINED {
                return SUMS >= 3 ? Int8::shifted_int4_pair(words[p], i) : Int8::int4_pair(words[p], i);
            });
            beside(i);
        }
    }
    if constexpr (SUMS >= 3)
        UNROLLED for (int i = 1; i < 3; i++) UNROLLED for (int r = 0; r < ROWS; r++)
            UNROLLED for (int p = 0; p < PANELS; p++) sums[i][r][p] = Int8::shifted_back(sums[i][r][p], i);
}

// The same for a format with a table. Pairs 0 and 2 of each four are looked up at once, and so are 1 and 3.
template <int SUMS, int ROWS, int PANELS, class Beside>
INLINE void add_table_pairs(Int8::Sum (&sums)[SUMS][ROWS][PANELS], const uint8_t* const (&panels)[PANELS],
                            const uint8_t* table, const Int8::Row* rows, long row_stride, Beside beside) {
#if defined(BRLITE_HAS_DOTPROD)
    return add_quads<ROWS>(&sums[0][0][0], 1, TablePanel{{panels[0]}, table}, rows, row_stride, BRLITE_GROUP);
#endif
    _Pragma("GCC unroll 1") for (int first = 0; first < BRLITE_GROUP / 2; first += 4) {
        UNROLLED for (int k = 0; k < 4; k++) {
            const int i = k % 2 * 2 + k / 2;
            add_pair(sums[k % SUMS], rows + 2 * (first + i), row_stride,
                     [&](int p) INLINED { return Int8::load_table(panels[p] + first * LANES, i, table); });
            beside(k);
        }
    }
}

// As `add_pairs`, for one group of a Q6_K panel, whose codes are 0 to 63.
template <int SUMS, int ROWS, int PANELS>
INLINE void add_q6_k_pairs(Int8::Sum (&sums)[SUMS][ROWS][PANELS], const uint8_t* const (&panels)[PANELS],
                           const Int8::Row* rows, long row_stride) {
#if defined(BRLITE_HAS_DOTPROD)
    return add_quads<ROWS>(&sums[0][0][0], 1, Q6KPanel{panels[0]}, rows, row_stride, BRLITE_GROUP / 2);
#endif
    UNROLLED for (int pair = 0; pair < BRLITE_GROUP / 4; pair++)
        add_pair(sums[pair % SUMS], rows + 2 * pair, row_stride,
                 [&](int p) INLINED { return Int8::load_q6_k(panels[p], pair); });
}

// Independent sums per row, used in turn: a multiply-add takes several cycles, and the next need not wait for its sum.
#if defined(BRLITE_HAS_AVX512)
constexpr int sums_of_row(int, int) { return 4; }  // of tiles of one panel; those of two have one sum
#elif defined(BRLITE_HAS_AVX2)
constexpr int sums_of_row(int format, int num_rows) { return is_int4(format) && num_rows == 1 ? 3 : 1; }
#else
constexpr int sums_of_row(int, int) { return 1; }
#endif

// The same group of activations in some rows.
struct GroupOfRows {
    const ActivationGroup* first;
    long stride;
    INLINED const ActivationGroup& operator[](int row) const { return first[row * stride]; }
};

// One row of integers prefetches its weights between the products: a line of 64 bytes after so many pairs, in their
// order, not a group's lines at once. So about as many lines are on their way at any time. 0: not here, but in
// linear.h.
#if defined(BRLITE_HAS_AVX512) || (defined(BRLITE_HAS_AVX2) && !defined(BRLITE_HAS_VNNI))
constexpr int pairs_of_line(int format, int num_rows) {
    return num_rows > 1 || format == BRLITE_Q6_K ? 0 : code_bits(format) == 4 ? 4 : 2;
}
// asm: GCC would move prefetches to the start of the group.
INLINE void fetch_line(const uint8_t* line) { asm volatile("prefetcht0 %0" ::"m"(*line)); }
#else
constexpr int pairs_of_line(int, int) { return 0; }
INLINE void fetch_line(const uint8_t*) {}
#endif
constexpr long FETCH_AHEAD_BESIDE = 21 * 64;  // bytes

template <int PAIRS>
struct FetchBeside {
    const uint8_t* line;
    INLINED void operator()(int pair) {
        if (PAIRS == 0 || pair % PAIRS != PAIRS - 1) return;
        fetch_line(line);
        line += 64;
    }
};

// sums[row][panel] = the sum of one group of each panel: of integer activations times codes. A group of Q6_K is half a
// group of activations, its first (`half` 0) or its second. Its sums start at -32 times the sum of these: codes are 32
// too large. Those of INT4 start at -8 times the sum.
template <int FORMAT, int ROWS, int PANELS>
INLINE void sum_integers(Floats (&sums)[ROWS][PANELS], const uint8_t* const (&groups)[PANELS], const Int8::Row* rows,
                         long row_size, const GroupOfRows& activations, int half, const uint8_t* table) {
    constexpr int SUMS = PANELS > 1 ? 1 : sums_of_row(FORMAT, ROWS);
    Int8::Sum parts[SUMS][ROWS][PANELS];
    UNROLLED for (int i = 0; i < SUMS; i++) clear<Int8>(parts[i]);
    constexpr int PAIRS = pairs_of_line(FORMAT, ROWS);
    const uint8_t* ahead = groups[0] + FETCH_AHEAD_BESIDE;
    const FetchBeside<PAIRS> beside{ahead};
    const auto start_at = [&](auto value) INLINED {
        UNROLLED for (int r = 0; r < ROWS; r++) UNROLLED for (int p = 0; p < PANELS; p++) parts[0][r][p] =
            Int8::equal(value(activations[r]));
    };
    if constexpr (is_int4(FORMAT)) {
        if (FORMAT == BRLITE_INT4) start_at([](const ActivationGroup& of) INLINED { return of.minus_8_sums; });
        add_int4_pairs(parts, groups, rows, row_size, beside);
    } else if constexpr (FORMAT == BRLITE_Q6_K) {
        start_at([half](const ActivationGroup& of) INLINED { return of.minus_32_sums[half]; });
        add_q6_k_pairs(parts, groups, rows, row_size);
    } else if constexpr (has_table(FORMAT)) {
        if (Int8::TABLE_BIAS) start_at([](const ActivationGroup& of) INLINED { return of.minus_128_sums; });
        add_table_pairs(parts, groups, table, rows, row_size, beside);
    } else {
        add_pairs<Int8>(parts, groups, Int8::PAIR_BYTES, rows, row_size, BRLITE_GROUP / 2, beside);
    }
    if constexpr (PAIRS != 0) fetch_line(ahead + code_bytes(FORMAT));
    UNROLLED for (int r = 0; r < ROWS; r++) UNROLLED for (int p = 0; p < PANELS; p++) {
        UNROLLED for (int i = 1; i < SUMS; i++) parts[0][r][p] = Int8::plus(parts[0][r][p], parts[i][r][p]);
        sums[r][p] = Int8::floats(parts[0][r][p]);
    }
}

// What a block's groups multiply their scales and minimums by.
struct Factors {
    Floats scales, minimums;

    INLINED void read(int format, const uint8_t* head) {
        scales = from_fp16((const uint16_t*)head);
        if (has_minimums(format)) minimums = from_fp16((const uint16_t*)head + LANES);
    }
};

// The scales of a group, which are at `at`, and its minimums or zero points.
INLINE Floats scales_of(int format, const uint8_t* at, const Factors& factors) {
    if (has_blocks(format)) return from_bytes(at) * factors.scales;
    if (format == BRLITE_MXFP4) return from_exponents(at);
    return format == BRLITE_INT8 ? from_halves((const uint16_t*)at) : from_fp16((const uint16_t*)at);
}
INLINE Floats offsets_of(int format, const uint8_t* at, const Factors& factors) {
    if (has_blocks(format)) return from_bytes(at + LANES) * factors.minimums;
    return from_fp16((const uint16_t*)at + LANES);
}

// out[row][panel * 16 ..] = the sums as floats.
template <class Kind, int ROWS, int PANELS>
INLINE void store_sums(typename Kind::Sum (&sums)[ROWS][PANELS], float* out, long out_stride) {
    UNROLLED for (int r = 0; r < ROWS; r++) UNROLLED for (int p = 0; p < PANELS; p++)
        store(out + r * out_stride + p * LANES, Kind::floats(sums[r][p]));
}

}  // namespace BRLITE_ISA
}  // namespace brlite
