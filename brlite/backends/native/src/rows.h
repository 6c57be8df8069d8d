// Operations on single rows: EMBED, NORM, SILU, GATE, QUANTIZE. Threads divide the rows among themselves.
#pragma once

#include "grouped.h"

namespace brlite {
namespace BRLITE_ISA {

constexpr float MAX_ACTIVATION = 32767.0f, MAX_INT8_ACTIVATION = 127.0f;

// The largest magnitude of a row; NaN or infinite for a row that is not finite.
INLINE float peak_of(const float* from, int size) {
    Ints best = Ints{};
    for (int i = 0; i < size; i += LANES) best = larger_magnitude(best, load(from + i));
    return largest_magnitude(best);
}

// Quantizes a row with this largest magnitude to int16. Returns its scale; NaN for a row that is not finite, so that
// its products are NaN, too.
INLINE float quantize_row(const float* from, int size, float peak, int16_t* to) {
    if (!is_finite(peak)) {
        memset(to, 0, size * sizeof *to);
        return __builtin_nanf("");
    }
    const float inverse = peak > 0 ? MAX_ACTIVATION / peak : 0.0f;
    // A peak so small that its inverse overflows counts as 0.
    const Floats factor = splat(is_finite(inverse) ? inverse : 0.0f);
    for (int i = 0; i < size; i += LANES) write_int16(to + i, rounded(load(from + i) * factor));
    return peak / MAX_ACTIVATION;
}

INLINE void store_row(uint16_t* to, Floats bf16) { store_halves(to, bf16); }
INLINE void store_row(float* to, Floats bf16) { store(to, bf16); }

INLINE void round_row(const float* from, int size, Bf16::Row* to) {
    for (int i = 0; i < size; i += LANES) store_row(to + i, to_bf16(load(from + i)));
}

// The exact sums of both halves of a group of integers.
struct HalfSums {
    int32_t low, high;
};
#if defined(BRLITE_HAS_AVX2) || defined(BRLITE_HAS_AVX512)
INLINE HalfSums sum_lanes(__m256i low, __m256i high) {
    const __m256i pairs = _mm256_hadd_epi32(low, high);  // low, low, high, high; and again
    const __m128i fours = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    const __m128i sums = _mm_hadd_epi32(fours, fours);
    return {_mm_cvtsi128_si32(sums), _mm_extract_epi32(sums, 1)};
}
INLINE HalfSums sum_halves(Ints low, Ints high) {
    return sum_lanes((__m256i)(low_half(low) + high_half(low)), (__m256i)(low_half(high) + high_half(high)));
}
INLINE HalfSums sum_halves(const int16_t* from) {
    const __m256i ones = _mm256_set1_epi16(1), *halves = (const __m256i*)from;
    return sum_lanes(_mm256_madd_epi16(_mm256_loadu_si256(halves), ones),
                     _mm256_madd_epi16(_mm256_loadu_si256(halves + 1), ones));
}
#else
INLINE HalfSums sum_halves(Ints low, Ints high) { return {(int32_t)sum_of(low), (int32_t)sum_of(high)}; }
INLINE HalfSums sum_halves(const int16_t* from) {
    Ints low, high;
    read(low, from);
    read(high, from + LANES);
    return sum_halves(low, high);
}
#endif

// The integers that sums start at are plus `bias`.
INLINE ActivationGroup group_of(HalfSums halves, float scale, int32_t bias) {
    const int32_t sum = halves.low + halves.high;
    return {scale,          (float)sum,       (float)sum * scale,
            bias - 8 * sum, bias - 128 * sum, {bias - 32 * halves.low, bias - 32 * halves.high}};
}

// The exact sum of each group of integers.
INLINE void sum_groups(const int16_t* from, int size, ActivationGroup* to) {
    for (int i = 0; i < size; i += BRLITE_GROUP) *to++ = group_of(sum_halves(from + i), 1.0f, 0);
}

// Quantizes a row to integers of up to 127 with one scale for each group; the next group is `block_rows` further. The
// scale is NaN where a number of the group is not finite.
INLINE void quantize_groups(const float* from, int size, GroupedRow* to, ActivationGroup* groups, int block_rows) {
    static_assert(BRLITE_GROUP == 2 * LANES, "a group is two vectors");
    float peaks[LANES] = {}, factors[LANES], scales[LANES];
    for (int left = size / BRLITE_GROUP; left > 0; left -= LANES) {  // as many groups at once as there are lanes
        const int count = smaller(left, LANES);
        for (int i = 0; i < count; i++) {
            const Ints low = larger_magnitude(Ints{}, load(from + i * BRLITE_GROUP));
            peaks[i] = largest_magnitude(larger_magnitude(low, load(from + i * BRLITE_GROUP + LANES)));
        }
        const Floats peak = load(peaks), inverse = splat(MAX_INT8_ACTIVATION) / peak;
        const Ints has_peak = are_finite(peak);
        // 0 for a peak of 0 or so small that its inverse overflows.
        store(factors, choose(has_peak & are_finite(inverse), inverse, Floats{}));
        store(scales, choose(has_peak, peak / MAX_INT8_ACTIVATION, splat(__builtin_nanf(""))));
        for (int i = 0; i < count; i++, from += BRLITE_GROUP, to += block_rows * BRLITE_GROUP, groups += block_rows) {
            const Floats factor = splat(factors[i]), nothing = Floats{};
            const Ints low = rounded(factors[i] > 0 ? load(from) * factor : nothing),
                       high = rounded(factors[i] > 0 ? load(from + LANES) * factor : nothing);
            store_group(to, low, high);
            *groups = group_of(sum_halves(low, high), scales[i], SUM_BIAS_BITS);
        }
    }
}

// Writes `values` as row `row` of the activations of a matrix. `size` is a multiple of 16, and of 32 if the format
// needs sums.
INLINE void write_row(const Activations& to, int format, int row, const float* values, int size) {
    if (!takes_int16(format)) return round_row(values, size, (Bf16::Row*)to.rows + row * to.row_size);
    int16_t* integers = (int16_t*)to.rows + row * to.row_size;
    to.scales[row] = quantize_row(values, size, peak_of(values, size), integers);
    if (needs_sums(format)) sum_groups(integers, size, to.groups + row * to.row_size / BRLITE_GROUP);
}

// As `write_row`, for the activations that `op` writes: with `has_int8_rows` int8, with one scale for each group.
INLINE void write_input(const Activations& to, const brlite_operation& op, int row, const float* values, int size) {
    if (!op.has_int8_rows) return write_row(to, op.format, row, values, size);
    const long first_group = to.first_group(row);
    quantize_groups(values, size, (GroupedRow*)to.rows + first_group * BRLITE_GROUP, to.groups + first_group,
                    to.block_rows);
}

// The squares of rows of int16, in the order of the rows.
static void add_squares(const brlite_operation& op, const Activations& from, int num_rows) {
    for (int row = 0; row < num_rows; row++) {
        const int16_t* integers = (const int16_t*)from.rows + row * from.row_size;
        const double factor = (double)from.scales[row] * from.scales[row];
        for (int i = 0; i < op.num_inputs; i++) op.squares[i] += factor * (integers[i] * integers[i]);
    }
}

// ---- EMBED -------------------------------------------------------------------------------------------------------

// The code of input `i` of a group in a column.
INLINE int code_at(int format, const uint8_t* group, int column, int i) {
    const int lane = 2 * column + i % 2, pair = i / 2;
    if (code_bits(format) == 8) return (int8_t)group[pair * 2 * LANES + lane];
    if (format == BRLITE_Q6_K) {
        const uint8_t* byte = group + 2 * lane + q6_k_byte(pair);
        const int vector = q6_k_vector(pair), size = 4 * LANES;
        if (vector < 3) return byte[vector * size] & 63;
        return byte[0] >> 6 | byte[size] >> 6 << 2 | byte[2 * size] >> 6 << 4;
    }
    uint16_t word;
    memcpy(&word, group + pair / 4 * 4 * LANES + 2 * lane, sizeof word);
    const int code = word >> 4 * (pair % 4) & 15;
    return !has_table(format) ? code : (format == BRLITE_MXFP4 ? E2M1_NUMBERS : IQ4_NUMBERS)[code];
}

static void unpack_integers(int format, const uint8_t* panels, int row, int num_inputs, float* out) {
    const uint8_t* group = panels + row / LANES * panel_bytes(format, num_inputs);
    Factors factors;
    const int column = row % LANES, size = group_inputs(format);
    for (int first = 0; first < num_inputs; first += size, group += group_bytes(format)) {
        if (has_blocks(format) && first % BRLITE_BLOCK == 0) {
            factors.read(format, group);
            group += block_head_bytes(format);
        }
        const uint8_t* at = group + code_bytes(format);
        const float scale = scales_of(format, at, factors)[column];
        const float offset = has_offsets(format) ? offsets_of(format, at, factors)[column] : 0.0f;
        const float minimum = has_minimums(format) ? offset : 0.0f;
        const int zero = format == BRLITE_INT4        ? 8
                         : format == BRLITE_Q6_K      ? 32
                         : format == BRLITE_INT4_ZERO ? (int)offset
                                                      : 0;
        for (int i = 0; i < smaller(size, num_inputs - first); i++)
            out[first + i] = (code_at(format, group, column, i) - zero) * scale + minimum;
    }
}

static void unpack_bf16(const uint8_t* panels, int row, int num_inputs, float* out) {
    const uint16_t* panel = (const uint16_t*)(panels + row / LANES * panel_bytes(BRLITE_BF16, num_inputs));
    for (int i = 0; i < num_inputs; i++) {
        const uint32_t bits = (uint32_t)panel[i / 2 * 2 * LANES + 2 * (row % LANES) + i % 2] << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
}

static void unpack_row(int format, const void* panels, int row, int num_inputs, float* out) {
    if (format == BRLITE_BF16)
        unpack_bf16((const uint8_t*)panels, row, num_inputs, out);
    else
        unpack_integers(format, (const uint8_t*)panels, row, num_inputs, out);
}

INLINE void embed_row(const Step& step, const brlite_operation& op, int row) {
    float* out = op.output + (long)row * op.row_size;
    const int token = step.batch->token_ids[row] - op.first;
    if (token < 0 || token >= op.count) return;  // another rank has this token
    // ADD adds 0 to this padding, for the zero columns of the last panel: a NaN left by the last step would stay NaN.
    for (int i = op.num_outputs; i < op.row_size; i++) out[i] = 0.0f;
    if (!op.is_table) return unpack_row(op.format, op.weight, token, op.num_outputs, out);
    const uint16_t* from = (const uint16_t*)op.weight + (long)token * op.num_outputs;
    for (int i = 0; i < op.num_outputs; i++) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
}

// ---- NORM, SILU --------------------------------------------------------------------------------------------------

// Root mean square norm (Zhang & Sennrich 2019) of `num_inputs` numbers, padded with zeros to `size`.
INLINE void normalize(const float* in, int num_inputs, int size, const float* weight, float epsilon, float* out) {
    Floats squares = splat(0.0f);
    for (int i = 0; i < size; i += LANES) squares = squares + load(in + i) * load(in + i);
    const float mean = sum_of(squares) / (float)num_inputs;
    const Floats scale = splat(1.0f / __builtin_sqrtf(mean + epsilon));
    for (int i = 0; i < size; i += LANES) store(out + i, load(in + i) * scale * load(weight + i));
}

INLINE void norm_row(const brlite_operation& op, const float* in, float* out) {
    normalize(in, op.num_inputs, padded_inputs(op.num_inputs), (const float*)op.weight, op.epsilon, out);
}

// gate * sigmoid(gate) * up, padded with zeros to `padded_size`.
INLINE void silu_row(const brlite_operation& op, const float* in, float* out, int padded_size) {
    const int size = op.num_inputs;
    for (int i = 0; i < padded_size; i += LANES) {
        const Floats gate = load(in + i), up = load(in + size + i);
        const Floats value = gate / (exp_of(-gate) + 1.0f) * up;
        store(out + i, choose(is_less(lane_numbers(), splat_int(size - i)), value, Floats{}));
    }
}

// One row operation on one row.
static void row_operation(const Step& step, const brlite_operation& op, Scratch& scratch, const Activations& to,
                          int row) {
    const int size = padded_inputs(op.num_inputs);
    const float* in = op.input + (long)row * op.row_size;
    switch (op.kind) {
        case BRLITE_EMBED:
            return embed_row(step, op, row);
        case BRLITE_GATE:
            return silu_row(op, in, op.output + (long)row * op.output_row_size, rounded_up(op.num_inputs, LANES));
        case BRLITE_NORM:
            norm_row(op, in, scratch.row);
            return write_input(to, op, row, scratch.row, size);
        case BRLITE_SILU:
            silu_row(op, in, scratch.row, size);
            return write_input(to, op, row, scratch.row, size);
        default:
            return write_input(to, op, row, in, size);
    }
}

}  // namespace BRLITE_ISA
}  // namespace brlite
