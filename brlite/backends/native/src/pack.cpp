// Packs matrices into panels. int8: weights are rounded to bfloat16 first; then each group of 32 inputs gets one scale.
// The scale is the smallest bfloat16 number that is at least (largest magnitude) / 127, so no code exceeds 127. A scale
// takes 2 bytes: 1.0625 bytes a weight. int4: the same groups, with a scale and a minimum each, in half precision
// (IEEE), 0.625 bytes a weight. Codes that a file holds quantized are copied, without rounding.
#include <math.h>
#include <string.h>

#include <algorithm>

#include "brlite.h"
#include "kernels.h"
#include "step.h"

namespace brlite {

namespace {

uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

float from_half(uint16_t half) { return from_bits((uint32_t)half << 16); }

// As to_bf16 of lanes.h: ties to even, subnormal numbers become 0, NaN stays NaN.
uint16_t to_half(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits | 0x400000) >> 16);
    if ((bits & 0x7f800000) == 0) return (uint16_t)(bits >> 16 & 0x8000);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The smallest bfloat16 number that is not below x > 0.
uint16_t half_above(float x) { return (uint16_t)((bits_of(x) + 0xffff) >> 16); }

struct Place {
    uint8_t* panel;
    int column;
};

Place place_of(int format, int row, int num_inputs, void* panels) {
    return {(uint8_t*)panels + row / BRLITE_LANES * panel_bytes(format, num_inputs), row % BRLITE_LANES};
}

// The same of a float32's bits, as a float32's bits, without branches: compilers make vectors of it.
uint32_t to_half_bits(uint32_t bits) {
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t near = bits + 0x7fff + (bits >> 16 & 1);
    const uint32_t kept = magnitude > 0x7f800000 ? bits | 0x400000 : near;
    return (magnitude < 0x00800000 ? bits & 0x80000000 : kept) & 0xffff0000;
}

// 1.5 * 2^23. Added to x, |x| < 2^22, it rounds away the fraction, ties to even.
constexpr float LARGE = 12582912.0f;

float nearest(float x) { return (x + LARGE) - LARGE; }

void pack_group(const float* weights, uint8_t* group, int column) {
    uint32_t bits[BRLITE_GROUP];
    memcpy(bits, weights, sizeof bits);
    int32_t peak_bits = 0;  // magnitudes compared as integers: a NaN counts as the largest
    for (int i = 0; i < BRLITE_GROUP; i++) bits[i] = to_half_bits(bits[i]);
    for (int i = 0; i < BRLITE_GROUP; i++) peak_bits = std::max(peak_bits, (int32_t)(bits[i] & 0x7fffffff));
    const bool is_finite = peak_bits < 0x7f800000;
    const uint16_t half = is_finite ? half_above(from_bits(peak_bits) / 127.0f) : (uint16_t)(peak_bits >> 16);
    memcpy(group + BRLITE_GROUP * BRLITE_LANES + 2 * column, &half, sizeof half);
    const bool has_values = is_finite && half > 0;
    const float scale = has_values ? from_half(half) : 1.0f;
    const uint32_t mask = has_values ? 0xffffffff : 0;
    int32_t values[BRLITE_GROUP];
    for (int i = 0; i < BRLITE_GROUP; i++) values[i] = (int32_t)nearest(from_bits(bits[i] & mask) / scale);
    for (int i = 0; i < BRLITE_GROUP; i += 2) {
        const uint16_t pair = (uint16_t)((values[i] & 0xff) | (values[i + 1] & 0xff) << 8);
        memcpy(group + i * BRLITE_LANES + 2 * column, &pair, sizeof pair);
    }
}

void pack_row_int8(const float* weights, int num_inputs, Place to) {
    const size_t group_bytes = BRLITE_GROUP * BRLITE_LANES + 2 * BRLITE_LANES;
    const int whole = num_inputs / BRLITE_GROUP * BRLITE_GROUP;
    for (int first = 0; first < whole; first += BRLITE_GROUP, to.panel += group_bytes)
        pack_group(weights + first, to.panel, to.column);
    if (whole == num_inputs) return;
    float rest[BRLITE_GROUP] = {};
    memcpy(rest, weights + whole, (num_inputs - whole) * sizeof *rest);
    pack_group(rest, to.panel, to.column);
}

// Each word has the lower 4 bits of four bytes, of inputs that are 2 apart; int4_pair of multiply.h takes them apart.
void place_int4(const uint8_t* codes, uint8_t* group, int column) {
    for (int first = 0; first < BRLITE_GROUP; first += 8)
        for (int i = first; i < first + 2; i++) {
            uint16_t word = 0;
            for (int k = 0; k < 4; k++) word |= (codes[i + 2 * k] & 15) << 4 * k;
            memcpy(group + first / 2 * BRLITE_LANES + 2 * (2 * column + i % 2), &word, sizeof word);
        }
}

// The blocks of GGML's K formats are those of llama.cpp's ggml-common.h. A panel's block begins with the numbers in
// half precision of all columns. That of the minimums is negated: a weight is scale * code + minimum.
struct BlockOfQ4K {
    uint16_t scale, minimum;
    uint8_t factors[12];  // 6 bits for each of 8 scales and 8 minimums
    uint8_t codes[128];   // 32 bytes for two groups: the first in their lower 4 bits
};
static_assert(sizeof(BlockOfQ4K) == 144, "as in a file");

struct BlockOfQ6K {
    uint8_t lower[128];  // 4 bits: 64 bytes for 128 inputs, the first 64 in their lower 4 bits
    uint8_t upper[64];   // 2 bits: 32 bytes for 128 inputs, the first 32 in their lowest 2 bits, and so on
    int8_t factors[16];
    uint16_t scale;
};
static_assert(sizeof(BlockOfQ6K) == 210, "as in a file");

void place_group(const BlockOfQ4K& block, int index, uint8_t* group, int column) {
    uint8_t codes[BRLITE_GROUP];
    for (int i = 0; i < BRLITE_GROUP; i++) codes[i] = block.codes[index / 2 * BRLITE_GROUP + i] >> 4 * (index % 2);
    place_int4(codes, group, column);
    const uint8_t *low = block.factors, *middle = low + 4, *high = low + 8;
    const int k = index % 4;
    uint8_t* factors = group + code_bytes(BRLITE_Q4_K) + column;
    factors[0] = index < 4 ? low[k] & 63 : (high[k] & 15) | low[k] >> 6 << 4;
    factors[BRLITE_LANES] = index < 4 ? middle[k] & 63 : high[k] >> 4 | middle[k] >> 6 << 4;
}

void place_group(const BlockOfQ6K& block, int index, uint8_t* group, int column) {
    constexpr int SIZE = group_inputs(BRLITE_Q6_K), VECTOR_BYTES = 4 * BRLITE_LANES;
    uint8_t vectors[4][4];  // the column's bytes: of the even inputs, then of the odd ones
    for (int i = 0; i < SIZE; i++) {
        const int input = index * SIZE + i, half = input / 128, quarter = input % 128 / 32;
        const int lower = block.lower[64 * half + input % 64] >> 4 * (quarter / 2) & 15;
        const int upper = block.upper[32 * half + input % 32] >> 2 * quarter & 3;
        vectors[q6_k_vector(i / 2)][2 * (i % 2) + q6_k_byte(i / 2)] = (uint8_t)(lower | upper << 4);
    }
    for (int v = 0; v < 3; v++)
        for (int k = 0; k < 4; k++)
            group[v * VECTOR_BYTES + 4 * column + k] = (uint8_t)(vectors[v][k] | (vectors[3][k] >> 2 * v & 3) << 6);
    group[code_bytes(BRLITE_Q6_K) + column] = (uint8_t)block.factors[index];
}

struct BlockOfIQ4NL {
    uint16_t scale;
    uint8_t codes[16];  // of the first 16 inputs in the lower 4 bits
};
static_assert(sizeof(BlockOfIQ4NL) == 18, "as in a file");

struct BlockOfIQ4XS {
    uint16_t scale;
    uint16_t upper;    // 2 bits for each of 8 factors
    uint8_t lower[4];  // 4 bits
    uint8_t codes[8][16];
};
static_assert(sizeof(BlockOfIQ4XS) == 136, "as in a file");

struct BlockOfMXFP4 {
    uint8_t exponent;
    uint8_t codes[16];
};
static_assert(sizeof(BlockOfMXFP4) == 17, "as in a file");

// 32 codes of a table: the first 16 in the lower 4 bits.
void place_halves(const uint8_t (&from)[16], uint8_t* group, int column) {
    uint8_t codes[BRLITE_GROUP];
    for (int i = 0; i < BRLITE_GROUP; i++) codes[i] = from[i % 16] >> 4 * (i / 16);
    place_int4(codes, group, column);
}

void place_group(const BlockOfIQ4NL& block, int, uint8_t* group, int column) {
    place_halves(block.codes, group, column);
    memcpy(group + code_bytes(BRLITE_IQ4_NL) + 2 * column, &block.scale, 2);
}

void place_group(const BlockOfIQ4XS& block, int index, uint8_t* group, int column) {
    place_halves(block.codes[index], group, column);
    const int factor = (block.lower[index / 2] >> 4 * (index % 2) & 15) | (block.upper >> 2 * index & 3) << 4;
    group[code_bytes(BRLITE_IQ4_XS) + column] = (uint8_t)(factor - 32);
}

void place_group(const BlockOfMXFP4& block, int, uint8_t* group, int column) {
    place_halves(block.codes, group, column);
    // One less, since the table has twice the numbers.
    group[code_bytes(BRLITE_MXFP4) + column] = (uint8_t)std::max(block.exponent - 1, 0);
}

void place_head(const BlockOfQ4K& from, uint8_t* block, int column) {
    const uint16_t minimum = from.minimum ^ 0x8000;
    memcpy(block + 2 * column, &from.scale, 2);
    memcpy(block + 2 * (BRLITE_LANES + column), &minimum, 2);
}

template <class Block>
void place_head(const Block& from, uint8_t* block, int column) {
    memcpy(block + 2 * column, &from.scale, 2);
}

// Packs rows of blocks. Of a row's last block, only the groups that hold inputs.
template <int FORMAT, class Block>
void pack_rows_of_blocks(const uint8_t* blocks, int first_row, int num_rows, int num_inputs, void* panels) {
    constexpr int INPUTS = has_blocks(FORMAT) ? BRLITE_BLOCK : BRLITE_GROUP;
    Block block;
    for (int row = first_row; row < first_row + num_rows; row++) {
        const Place to = place_of(FORMAT, row, num_inputs, panels);
        uint8_t* at = to.panel;
        for (int first = 0; first < num_inputs; first += group_inputs(FORMAT), at += group_bytes(FORMAT)) {
            const int index = first % INPUTS / group_inputs(FORMAT);
            if (index == 0) {
                memcpy(&block, blocks, sizeof block);
                blocks += sizeof block;
            }
            if constexpr (has_blocks(FORMAT)) {
                if (index == 0) {
                    place_head(block, at, to.column);
                    at += block_head_bytes(FORMAT);
                }
            }
            place_group(block, index, at, to.column);
        }
    }
}

// To IEEE half precision, ties to even; and back, for finite numbers.
uint16_t to_float16(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000, magnitude = bits_of(x) & 0x7fffffff;
    if (magnitude >= 0x47800000) return (uint16_t)(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (magnitude < 0x38800000) return (uint16_t)(sign | (bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f)));
    return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

float from_float16(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, shifted = (uint32_t)(half & 0x7fff) << 13;
    const bool is_subnormal = shifted < 0x00800000;
    const float magnitude = from_bits(shifted + (is_subnormal ? 0x38800000 : 0x38000000));
    return from_bits(bits_of(is_subnormal ? magnitude - from_bits(0x38800000) : magnitude) | sign);
}

typedef float Four __attribute__((vector_size(16)));

// A group of weights to be rounded to 4 bits, and how much the square of each one's error counts.
constexpr int NUM_FOURS = BRLITE_GROUP / 4;
struct Group {
    Four weights[NUM_FOURS], importance[NUM_FOURS];
};

struct Line {  // a weight is scale * code + minimum
    float scale, minimum;
};

double sum_of(const Four& four) {
    double sum = 0;
    for (int i = 0; i < 4; i++) sum += four[i];
    return sum;
}

// The code of each weight that is nearest on the line.
void find_codes(const Group& group, const Line& line, Four* codes) {
    const Four none = {}, most = none + 15.0f;
    const float inverse = line.scale > 0 ? 1 / line.scale : 0;
    for (int i = 0; i < NUM_FOURS; i++) {
        Four code = (group.weights[i] - line.minimum) * inverse;
        code = code > none ? code : none;
        code = code < most ? code : most;
        codes[i] = (code + LARGE) - LARGE;
    }
}

// The line with the least squares of errors for these codes; `line` if it has no slope.
Line fit(const Group& group, const Four* codes, const Line& line) {
    Four ones = {}, xs = {}, xxs = {}, ys = {}, xys = {};
    for (int i = 0; i < NUM_FOURS; i++) {
        const Four x = codes[i] * group.importance[i], y = group.weights[i] * group.importance[i];
        ones += group.importance[i];
        xs += x;
        xxs += x * codes[i];
        ys += y;
        xys += y * codes[i];
    }
    const double one = sum_of(ones), x = sum_of(xs), xx = sum_of(xxs), y = sum_of(ys), xy = sum_of(xys);
    const double spread = one * xx - x * x, slope = one * xy - x * y;
    if (!(spread > 0 && slope > 0)) return line;
    return {(float)(slope / spread), (float)((xx * y - x * xy) / spread)};
}

double error_of(const Group& group, const Four* codes, const Line& line) {
    Four sums = {};
    for (int i = 0; i < NUM_FOURS; i++) {
        const Four error = codes[i] * line.scale + line.minimum - group.weights[i];
        sums += group.importance[i] * error * error;
    }
    return sum_of(sums);
}

// The best of some lines, each fitted to its codes: they clamp different parts of the group's range. The first clamps
// nothing, and with `is_quick` is the only one.
Line find_line(const Group& group, bool is_quick, Four* best_codes) {
    Four leasts = group.weights[0], mosts = group.weights[0];
    for (const Four& weights : group.weights) {
        leasts = weights < leasts ? weights : leasts;
        mosts = weights > mosts ? weights : mosts;
    }
    const float least = std::min({leasts[0], leasts[1], leasts[2], leasts[3]});
    const float range = std::max({mosts[0], mosts[1], mosts[2], mosts[3]}) - least;
    Line best = {0, least};
    double best_error = -1;
    for (float steps : {15.0f, 14.4f, 14.7f, 15.3f, 15.6f, 15.9f, 16.2f}) {
        Four codes[NUM_FOURS];
        const Line first = {range / steps, least};
        find_codes(group, first, codes);
        const Line fitted = fit(group, codes, first);
        const Line line = {from_float16(to_float16(fitted.scale)), from_float16(to_float16(fitted.minimum))};
        find_codes(group, line, codes);
        const double error = error_of(group, codes, line);
        if (best_error >= 0 && error >= best_error) continue;
        best = line, best_error = error;
        std::copy(codes, codes + NUM_FOURS, best_codes);
        if (is_quick) break;
    }
    return best;
}

// Of a group that is not finite, all weights become NaN.
void pack_group_int4(const float* weights, const float* importance, int num_inputs, uint8_t* to, int column) {
    uint32_t bits[BRLITE_GROUP] = {}, peak_bits = 0;
    memcpy(bits, weights, num_inputs * sizeof *bits);
    for (int i = num_inputs; i < BRLITE_GROUP; i++) bits[i] = bits[0];  // padding does not widen the range
    for (int i = 0; i < BRLITE_GROUP; i++) bits[i] = to_half_bits(bits[i]);
    for (int i = 0; i < BRLITE_GROUP; i++) peak_bits = std::max(peak_bits, bits[i] & 0x7fffffff);
    float counts[BRLITE_GROUP] = {};
    for (int i = 0; i < num_inputs; i++) counts[i] = importance ? importance[i] : 1.0f;
    Group group;
    memcpy(group.weights, bits, sizeof bits);
    memcpy(group.importance, counts, sizeof counts);
    Four codes[NUM_FOURS] = {};
    Line line = {0, __builtin_nanf("")};
    if (peak_bits < 0x7f800000) line = find_line(group, !importance, codes);
    uint8_t bytes[BRLITE_GROUP];
    for (int i = 0; i < BRLITE_GROUP; i++) bytes[i] = (uint8_t)codes[i / 4][i % 4];
    place_int4(bytes, to, column);
    const uint16_t scale = to_float16(line.scale), minimum = to_float16(line.minimum);
    uint8_t* halves = to + code_bytes(BRLITE_INT4_MIN) + 2 * column;
    memcpy(halves, &scale, sizeof scale);
    memcpy(halves + 2 * BRLITE_LANES, &minimum, sizeof minimum);
}

void place_int8(const uint8_t* codes, uint8_t* group, int column) {
    for (int i = 0; i < BRLITE_GROUP; i += 2) memcpy(group + i * BRLITE_LANES + 2 * column, codes + i, 2);
}

void pack_row_bf16(const float* weights, int num_inputs, Place to) {
    uint16_t* panel = (uint16_t*)to.panel;
    for (int i = 0; i < num_inputs; i++) panel[i / 2 * 2 * BRLITE_LANES + 2 * to.column + i % 2] = to_half(weights[i]);
}

}  // namespace

}  // namespace brlite

extern "C" {

size_t brlite_packed_bytes(int32_t format, int32_t num_outputs, int32_t num_inputs) {
    return (size_t)(brlite::rounded(num_outputs, BRLITE_LANES) / BRLITE_LANES) *
           brlite::panel_bytes(format, num_inputs);
}

void brlite_pack(int32_t format, const float* rows, int32_t first, int32_t num_rows, int32_t num_inputs, void* panels) {
    for (int32_t row = 0; row < num_rows; row++) {
        const brlite::Place to = brlite::place_of(format, first + row, num_inputs, panels);
        const float* weights = rows + (size_t)row * num_inputs;
        if (format == BRLITE_INT8)
            brlite::pack_row_int8(weights, num_inputs, to);
        else
            brlite::pack_row_bf16(weights, num_inputs, to);
    }
}

void brlite_pack_int4(const float* rows, const float* importance, int32_t first, int32_t num_rows, int32_t num_inputs,
                      void* panels) {
    for (int32_t row = 0; row < num_rows; row++) {
        brlite::Place to = brlite::place_of(BRLITE_INT4_MIN, first + row, num_inputs, panels);
        const float* weights = rows + (size_t)row * num_inputs;
        for (int i = 0; i < num_inputs; i += BRLITE_GROUP, to.panel += brlite::group_bytes(BRLITE_INT4_MIN))
            brlite::pack_group_int4(weights + i, importance ? importance + i : nullptr,
                                    std::min(BRLITE_GROUP, num_inputs - i), to.panel, to.column);
    }
}

void brlite_pack_codes(int32_t format, const uint8_t* codes, const uint16_t* scales, const uint16_t* offsets,
                       int32_t first, int32_t num_rows, int32_t num_inputs, void* panels) {
    const size_t num_groups = (size_t)num_rows * (num_inputs / BRLITE_GROUP);
    for (size_t i = 0; i < num_groups; i++) {
        const int row = first + (int)(i / (num_inputs / BRLITE_GROUP)), index = (int)(i % (num_inputs / BRLITE_GROUP));
        const brlite::Place to = brlite::place_of(format, row, num_inputs, panels);
        uint8_t* group = to.panel + index * brlite::group_bytes(format);
        (brlite::is_int4(format) ? brlite::place_int4 : brlite::place_int8)(codes + i * BRLITE_GROUP, group, to.column);
        uint8_t* halves = group + brlite::code_bytes(format) + 2 * to.column;
        memcpy(halves, scales + i, 2);
        if (brlite::has_offsets(format)) memcpy(halves + 2 * BRLITE_LANES, offsets + i, 2);
    }
}

void brlite_pack_blocks(int32_t format, const uint8_t* blocks, int32_t first, int32_t num_rows, int32_t num_inputs,
                        void* panels) {
    using namespace brlite;
    const auto pack = format == BRLITE_Q4_K     ? pack_rows_of_blocks<BRLITE_Q4_K, BlockOfQ4K>
                      : format == BRLITE_Q6_K   ? pack_rows_of_blocks<BRLITE_Q6_K, BlockOfQ6K>
                      : format == BRLITE_IQ4_NL ? pack_rows_of_blocks<BRLITE_IQ4_NL, BlockOfIQ4NL>
                      : format == BRLITE_IQ4_XS ? pack_rows_of_blocks<BRLITE_IQ4_XS, BlockOfIQ4XS>
                                                : pack_rows_of_blocks<BRLITE_MXFP4, BlockOfMXFP4>;
    pack(blocks, first, num_rows, num_inputs, panels);
}

void brlite_unpack_row(int32_t format, const void* panels, int32_t row, int32_t num_inputs, float* out) {
    brlite::generic_kernels()->unpack_row(format, panels, row, num_inputs, out);
}

size_t brlite_page_bytes(int32_t kv_format, int32_t head_dim) { return brlite::page_bytes(kv_format, head_dim); }

}  // extern "C"
