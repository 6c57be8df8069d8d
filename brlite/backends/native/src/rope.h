// ROPE: normalises queries and keys where the model has such norms, rotates them by their positions, and stores keys
// and values in the paged cache.
#pragma once

#include "rows.h"

namespace brlite {
namespace BRLITE_ISA {

struct Angles {
    const float* cos;
    const float* sin;
};

// (a, b) -> (a cos - b sin, b cos + a sin), for neighbours (2i, 2i + 1) or for halves (i, i + half) (Su et al. 2021).
INLINE void rotate_neighbours(int rotary_dim, Angles angles, const float* in, float* out) {
    for (int i = 0; i < rotary_dim / 2; i++) {
        const float x = in[2 * i], y = in[2 * i + 1];
        out[2 * i] = x * angles.cos[i] - y * angles.sin[i];
        out[2 * i + 1] = y * angles.cos[i] + x * angles.sin[i];
    }
}

INLINE void rotate_halves(int rotary_dim, Angles angles, const float* in, float* out) {
    const int half = rotary_dim / 2, whole = half / LANES * LANES;
    for (int i = 0; i < whole; i += LANES) {
        const Floats x = load(in + i), y = load(in + half + i), cos = load(angles.cos + i), sin = load(angles.sin + i);
        store(out + i, x * cos - y * sin);
        store(out + half + i, y * cos + x * sin);
    }
    for (int i = whole; i < half; i++) {
        const float x = in[i], y = in[half + i];
        out[i] = x * angles.cos[i] - y * angles.sin[i];
        out[half + i] = y * angles.cos[i] + x * angles.sin[i];
    }
}

INLINE void rotate(const brlite_attention& a, int rotary_dim, Angles angles, const float* in, float* out) {
    a.is_interleaved ? rotate_neighbours(rotary_dim, angles, in, out) : rotate_halves(rotary_dim, angles, in, out);
    memcpy(out + rotary_dim, in + rotary_dim, (a.head_dim - rotary_dim) * sizeof *out);
    memset(out + a.head_dim, 0, (head_size(a) - a.head_dim) * sizeof *out);
}

// Quantizes a head to int8. Returns its scale, NaN if the head is not finite.
INLINE float quantize_head(const float* from, int size, int8_t* to) {
    const float peak = peak_of(from, size), scale = peak / 127.0f;
    const bool is_usable = is_finite(peak) && scale > 0;
    for (int i = 0; i < size; i += LANES) write(to + i, is_usable ? rounded(load(from + i) / scale) : Ints{});
    return is_finite(peak) ? scale : __builtin_nanf("");
}

INLINE void store_int8(uint8_t* page, int slot, int size, const float* key, const float* value) {
    int8_t head[BRLITE_MAX_HEAD_DIM];
    float* scales = (float*)(page + 2 * page_part_bytes(BRLITE_INT8, size));
    scales[slot] = quantize_head(key, size, head);
    for (int i = 0; i < size; i += 2) memcpy(page + i * LANES + 2 * slot, head + i, 2);
    scales[LANES + slot] = quantize_head(value, size, head);
    uint8_t* values = page + page_part_bytes(BRLITE_INT8, size) + slot / 2 * 2 * size + slot % 2;
    for (int i = 0; i < size; i++) values[2 * i] = (uint8_t)head[i];
}

INLINE void store_bf16(uint8_t* page, int slot, int size, const float* key, const float* value) {
    uint16_t head[BRLITE_MAX_HEAD_DIM];
    for (int i = 0; i < size; i += LANES) store_halves(head + i, to_bf16(load(key + i)));
    for (int i = 0; i < size; i += 2) memcpy(page + 2 * (i * LANES + 2 * slot), head + i, 4);
    uint16_t* values = (uint16_t*)(page + page_part_bytes(BRLITE_BF16, size)) + slot / 2 * 2 * size + slot % 2;
    for (int i = 0; i < size; i += LANES) store_halves(head + i, to_bf16(load(value + i)));
    for (int i = 0; i < size; i++) values[2 * i] = head[i];
}

// A page may contain values of an earlier sequence. Attention multiplies them by weight 0, but 0 * NaN is NaN. So the
// first token of a page clears the values that no token of this step writes.
INLINE void clear_values(uint8_t* page, int size, int first_slot) {
    uint16_t* values = (uint16_t*)(page + page_part_bytes(BRLITE_BF16, size));
    for (int slot = first_slot; slot < LANES; slot++)
        for (int i = 0; i < size; i++) values[slot / 2 * 2 * size + 2 * i + slot % 2] = 0;
}

INLINE void store_head(const Step& step, const brlite_operation& op, int row, int kv_head, const float* key,
                       const float* value) {
    const brlite_attention& a = step.plan->attention;
    const brlite_span& span = step.batch->spans[step.row_spans[row]];
    const int position = step.positions[row], slot = position % LANES, size = head_size(a);
    uint8_t* page = page_of(a, span, op.pages, position / LANES, kv_head);
    if (a.kv_format == BRLITE_INT8) return store_int8(page, slot, size, key, value);
    if (slot == 0) clear_values(page, size, smaller(LANES, span.start + span.num_rows - position));
    store_bf16(page, slot, size, key, value);
}

// The head, normalised into `buffer`; without a norm the head itself.
INLINE const float* norm_head(const brlite_attention& a, const float* weight, float epsilon, const float* in,
                              float* buffer) {
    if (!weight) return in;
    const int size = head_size(a);
    memcpy(buffer, in, a.head_dim * sizeof *buffer);
    memset(buffer + a.head_dim, 0, (size - a.head_dim) * sizeof *buffer);
    normalize(buffer, a.head_dim, size, weight, epsilon, buffer);
    return buffer;
}

// Normalises, rotates and stores one key/value head of one row and the query heads that share it.
INLINE void rope_head(const Step& step, const brlite_operation& op, int row, int kv_head) {
    const brlite_attention& a = step.plan->attention;
    const int group = a.num_heads / a.num_kv_heads, size = head_size(a);
    const long first_angle = (long)step.positions[row] * (a.rotary_dim / 2);
    const Angles angles = {a.cos + first_angle, a.sin + first_angle};
    const float* heads = op.input + (long)row * op.row_size;
    const float *query_norm = (const float*)op.weight, *key_norm = op.bias;
    float normed[BRLITE_MAX_HEAD_DIM] __attribute__((aligned(64)));
    float turned[BRLITE_MAX_HEAD_DIM] __attribute__((aligned(64)));
    float value[BRLITE_MAX_HEAD_DIM] __attribute__((aligned(64)));
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const float* query = norm_head(a, query_norm, op.epsilon, heads + head * a.head_dim, normed);
        rotate(a, op.num_inputs, angles, query, turned);
        // So that a score is the exponent of its weight, a power of 2.
        for (int i = 0; i < size; i += LANES) store(turned + i, load(turned + i) * (a.softmax_scale * LOG2_E));
        write_row(step.queries, a.kv_format, row * a.num_heads + head, turned, size);
    }
    const float* key = norm_head(a, key_norm, op.epsilon, heads + (a.num_heads + kv_head) * a.head_dim, normed);
    rotate(a, op.num_inputs, angles, key, turned);
    memcpy(value, heads + (a.num_heads + a.num_kv_heads + kv_head) * a.head_dim, a.head_dim * sizeof *value);
    memset(value + a.head_dim, 0, (size - a.head_dim) * sizeof *value);
    store_head(step, op, row, kv_head, turned, value);
}

}  // namespace BRLITE_ISA
}  // namespace brlite
