// Packs matrices into panels. int8: weights are rounded to bfloat16 first; then each group of 32 inputs gets one scale.
// The scale is the smallest bfloat16 number that is at least (largest magnitude) / 127, so no code exceeds 127. A scale
// takes 2 bytes: 1.0625 bytes a weight. Codes that a file holds quantized are copied, without rounding.
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

// The nearest integer, ties to even, for |x| < 2^22: the addition rounds away the fraction.
float nearest(float x) {
    const float large = 12582912.0f;  // 1.5 * 2^23
    return (x + large) - large;
}

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

// Each word has four codes, of inputs that are 2 apart; load_int4 of multiply.h takes them apart.
void place_int4(const uint8_t* codes, uint8_t* group, int column) {
    for (int first = 0; first < BRLITE_GROUP; first += 8)
        for (int i = first; i < first + 2; i++) {
            const uint16_t word = (uint16_t)(codes[i] | codes[i + 2] << 4 | codes[i + 4] << 8 | codes[i + 6] << 12);
            memcpy(group + first / 2 * BRLITE_LANES + 2 * (2 * column + i % 2), &word, sizeof word);
        }
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

void brlite_unpack_row(int32_t format, const void* panels, int32_t row, int32_t num_inputs, float* out) {
    brlite::generic_kernels()->unpack_row(format, panels, row, num_inputs, out);
}

size_t brlite_page_bytes(int32_t kv_format, int32_t head_dim) { return brlite::page_bytes(kv_format, head_dim); }

}  // extern "C"
