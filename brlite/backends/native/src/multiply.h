// The products that everything is made of: a few rows of activations against panels of sixteen columns.
//
//   panel, one pair of inputs (k, k+1):    | n0:k n0:k+1 | n1:k n1:k+1 | … | n15:k n15:k+1 |
//   row of activations:                    … | a[k] a[k+1] | …             broadcast to all sixteen columns
//
// A pair of a panel takes 32 bytes in int8, 64 in bfloat16.
// A pair takes one multiplication per row and panel where the processor multiplies pairs. Weights of a matrix, keys and
// values of the cache all have this form, so there is one kernel for each number format. bfloat16 products add up one
// after the other, the odd input first: that is the order in which vdpbf16ps adds, so every instruction set has its
// bits.
#pragma once

#include "lanes.h"

namespace brlite {
namespace BRLITE_ISA {

#define UNROLLED _Pragma("GCC unroll 16")

// ---- what each instruction set has -------------------------------------------------------------------------------

#if defined(BRLITE_HAS_AVX512)

struct Int8 {
    typedef int16_t Row;
    typedef __m512i Sum;
    typedef __m512i Pair;
    typedef __m512i Broadcast;
    static constexpr int PAIR_BYTES = 32;
    INLINE Sum zero() { return _mm512_setzero_si512(); }
    INLINE Pair load(const uint8_t* at) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)at)); }
    INLINE Broadcast broadcast(const Row* row) {
        int32_t pair;
        memcpy(&pair, row, sizeof pair);
        return _mm512_set1_epi32(pair);
    }
    INLINE Sum add(Sum sum, Pair weights, Broadcast row) {
#if defined(BRLITE_HAS_VNNI)
        return _mm512_dpwssd_epi32(sum, weights, row);
#else
        return _mm512_add_epi32(sum, _mm512_madd_epi16(weights, row));
#endif
    }
    INLINE FloatParts floats(Sum sum) { return {{__builtin_convertvector((Ints)sum, Floats)}}; }
};

struct Bf16 {
    typedef __m512 Sum;
    typedef __m512i Pair;
    static constexpr int PAIR_BYTES = 64;
    INLINE Sum zero() { return _mm512_setzero_ps(); }
    INLINE Pair load(const uint8_t* at) { return _mm512_loadu_si512(at); }
    INLINE FloatParts floats(Sum sum) { return {{(Floats)sum}}; }
#if defined(BRLITE_HAS_BF16)
    typedef uint16_t Row;
    typedef __m512i Broadcast;
    INLINE Broadcast broadcast(const Row* row) {
        int32_t pair;
        memcpy(&pair, row, sizeof pair);
        return _mm512_set1_epi32(pair);
    }
    INLINE Sum add(Sum sum, Pair weights, Broadcast row) {
        return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)row);
    }
#else
    typedef float Row;
    struct Broadcast {
        __m512 even, odd;
    };
    INLINE Broadcast broadcast(const Row* row) { return {_mm512_set1_ps(row[0]), _mm512_set1_ps(row[1])}; }
    INLINE Sum add(Sum sum, Pair weights, Broadcast row) {
        __m512i odd = _mm512_and_si512(weights, _mm512_set1_epi32((int32_t)0xffff0000));
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(odd), row.odd, sum);
        return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)), row.even, sum);
    }
#endif
};

constexpr int MAX_ROWS = 6;  // of a tile; with two panels and int8's second set of sums 24 of the 32 registers
constexpr int panels_at_once(int num_rows) { return num_rows <= 3 ? 4 : 2; }

#elif defined(BRLITE_HAS_AVX2)

struct Int8 {
    typedef int16_t Row;
    struct Sum {
        __m256i low, high;
    };
    typedef Sum Pair;
    typedef __m256i Broadcast;
    static constexpr int PAIR_BYTES = 32;
    INLINE Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    INLINE Pair load(const uint8_t* at) {
        return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at)),
                _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(at + 16)))};
    }
    INLINE Broadcast broadcast(const Row* row) {
        Broadcast pair;  // GCC would load all rows' pairs first and then has no registers left for the sums
        asm volatile("vpbroadcastd %1, %0" : "=x"(pair) : "m"(*(const int32_t (*)[1])row));
        return pair;
    }
    INLINE Sum add(Sum sum, Pair weights, Broadcast row) {
        return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(weights.low, row)),
                _mm256_add_epi32(sum.high, _mm256_madd_epi16(weights.high, row))};
    }
    INLINE FloatParts floats(Sum sum) {
        return {{(FloatPart)_mm256_cvtepi32_ps(sum.low), (FloatPart)_mm256_cvtepi32_ps(sum.high)}};
    }
};

struct Bf16 {
    typedef float Row;
    struct Sum {
        __m256 low, high;
    };
    struct Pair {
        __m256i low, high;
    };
    typedef const float* Broadcast;
    static constexpr int PAIR_BYTES = 64;
    INLINE Sum zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    INLINE Pair load(const uint8_t* at) {
        return {_mm256_loadu_si256((const __m256i*)at), _mm256_loadu_si256((const __m256i*)(at + 32))};
    }
    INLINE Broadcast broadcast(const Row* row) { return row; }
    INLINE Sum add(Sum sum, Pair weights, Broadcast row) {
        const __m256i upper = _mm256_set1_epi32((int32_t)0xffff0000);
        __m256 odd = _mm256_broadcast_ss(row + 1), even = _mm256_broadcast_ss(row);
        sum.low = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(weights.low, upper)), odd, sum.low);
        sum.high = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(weights.high, upper)), odd, sum.high);
        sum.low = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(weights.low, 16)), even, sum.low);
        sum.high = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(weights.high, 16)), even, sum.high);
        return sum;
    }
    INLINE FloatParts floats(Sum sum) { return {{(FloatPart)sum.low, (FloatPart)sum.high}}; }
};

constexpr int MAX_ROWS = 5;  // of a tile; with one panel 10 of the 16 registers, the totals in memory
constexpr int panels_at_once(int num_rows) { return num_rows == 1 ? 4 : num_rows == 2 ? 2 : 1; }

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
    static constexpr int PAIR_BYTES = 32;
    INLINE Sum zero() { return Ints{}; }
    INLINE Pair load(const uint8_t* at) {
        Pair pair;
        for (int i = 0; i < LANES; i++) {
            pair.even[i] = (int8_t)at[2 * i];
            pair.odd[i] = (int8_t)at[2 * i + 1];
        }
        return pair;
    }
    INLINE Broadcast broadcast(const Row* row) { return {row[0], row[1]}; }
    INLINE Sum add(Sum sum, Pair weights, Broadcast row) {
        return sum + weights.even * row.even + weights.odd * row.odd;
    }
    INLINE FloatParts floats(Sum sum) { return same_bits<FloatParts>(__builtin_convertvector(sum, Floats)); }
};

struct Bf16 {
    typedef float Row;
    typedef Floats Sum;
    typedef Ints Pair;
    struct Broadcast {
        float even, odd;
    };
    static constexpr int PAIR_BYTES = 64;
    INLINE Sum zero() { return Floats{}; }
    INLINE Pair load(const uint8_t* at) { return *(const UnalignedInts*)at; }
    INLINE Broadcast broadcast(const Row* row) { return {row[0], row[1]}; }
    INLINE Sum add(Sum sum, Pair weights, Broadcast row) {  // products of bfloat16 numbers are exact: no FMA is needed
        sum = sum + from_bits(weights & (int32_t)0xffff0000) * row.odd;
        return sum + from_bits(weights << 16) * row.even;
    }
    INLINE FloatParts floats(Sum sum) { return same_bits<FloatParts>(sum); }
};

constexpr int MAX_ROWS = 4;
constexpr int panels_at_once(int) { return 1; }

#endif

// ---- what they are used for --------------------------------------------------------------------------------------

// sums[row][panel] += `num_pairs` pairs of `rows` with those of `panels`.
template <class Kind, int ROWS, int PANELS>
INLINE void add_pairs(typename Kind::Sum (&sums)[ROWS][PANELS], const uint8_t* const (&panels)[PANELS],
                      long pair_stride, const typename Kind::Row* rows, long row_stride, int num_pairs) {
    _Pragma("GCC unroll 4") for (int pair = 0; pair < num_pairs; pair++) {
        typename Kind::Pair weights[PANELS];
        UNROLLED for (int p = 0; p < PANELS; p++) weights[p] = Kind::load(panels[p] + pair * pair_stride);
        UNROLLED for (int r = 0; r < ROWS; r++) {
            typename Kind::Broadcast row = Kind::broadcast(rows + r * row_stride + 2 * pair);
            UNROLLED for (int p = 0; p < PANELS; p++) sums[r][p] = Kind::add(sums[r][p], weights[p], row);
        }
    }
}

template <class Kind, int ROWS, int PANELS>
INLINE void clear(typename Kind::Sum (&sums)[ROWS][PANELS]) {
    UNROLLED for (int r = 0; r < ROWS; r++) UNROLLED for (int p = 0; p < PANELS; p++) sums[r][p] = Kind::zero();
}

// out[row][panel * 16 ..] = the sums as floats.
template <class Kind, int ROWS, int PANELS>
INLINE void store_sums(typename Kind::Sum (&sums)[ROWS][PANELS], float* out, long out_stride) {
    UNROLLED for (int r = 0; r < ROWS; r++) UNROLLED for (int p = 0; p < PANELS; p++)
        store(out + r * out_stride + p * LANES, same_bits<Floats>(Kind::floats(sums[r][p])));
}

}  // namespace BRLITE_ISA
}  // namespace brlite
