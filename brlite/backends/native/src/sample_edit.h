// Edits of a row of logits before a draw: biases, bans, masks, then penalties.
#pragma once

#include "lanes.h"

namespace brlite {

// Waits until another thread has filled the draw's mask. Returns false after a minute.
bool wait_for_mask(const brlite_draw& draw);

namespace BRLITE_ISA {

constexpr double MAX_LOGIT = 3.4028234663852886e38;  // the largest float
constexpr double MAX_PENALTY = 1e30;                 // penalties are clamped to this, both positive and negative

INLINE double clamped(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

INLINE bool has_penalties(const brlite_draw& draw) {
    return draw.repetition_penalty != 1 || draw.presence_penalty != 0 || draw.frequency_penalty != 0;
}

INLINE bool has_edits(const brlite_draw& draw) {
    return draw.mask || draw.allowed || draw.num_biases > 0 || draw.num_banned > 0 || draw.num_costs > 0 ||
           (draw.num_counted > 0 && has_penalties(draw));
}

// Applies the penalties to the logit of a token that was generated `count` times. Clamped to the range of floats.
INLINE float penalized(float logit, float factor, double presence, double frequency, int count) {
    const float cost = (float)clamped((count > 0 ? presence : 0) + frequency * count, -MAX_LOGIT, MAX_LOGIT);
    const float value = (logit > 0 ? logit / factor : logit * factor) - cost;
    return (float)clamped(value, -MAX_LOGIT, MAX_LOGIT);
}

static void penalize(const brlite_draw& draw, float* logits) {
    const float factor = (float)clamped(draw.repetition_penalty, 1 / MAX_PENALTY, MAX_PENALTY);
    const double presence = clamped(draw.presence_penalty, -MAX_PENALTY, MAX_PENALTY);
    const double frequency = clamped(draw.frequency_penalty, -MAX_PENALTY, MAX_PENALTY);
    for (int i = 0; i < draw.num_counted; i++) {
        float& logit = logits[draw.counted_ids[i]];
        if (logit != -__builtin_inff()) logit = penalized(logit, factor, presence, frequency, draw.output_counts[i]);
    }
}

// Sets the logits of tokens whose bit is 0 to -inf.
static void apply_mask(const int32_t* mask, float* logits, int size) {
    const Ints lane_bits = Ints{} + 1 << lane_numbers();
    for (int i = 0; i < size; i += LANES) {
        const Ints is_out = is_equal(splat_int(mask[i / 32] >> i % 32) & lane_bits, Ints{});
        store(logits + i, choose(is_out, splat(-__builtin_inff()), load(logits + i)));
    }
}

static void edit_logits(const brlite_draw& draw, float* logits, int size) {
    for (int i = 0; i < draw.num_biases; i++) logits[draw.bias_ids[i]] += draw.biases[i];
    for (int i = 0; i < draw.num_banned; i++) logits[draw.banned_ids[i]] = -__builtin_inff();
    if (draw.allowed) apply_mask(draw.allowed, logits, size);
    if (draw.mask) apply_mask(draw.mask, logits, size);
    if (has_penalties(draw)) penalize(draw, logits);
    for (int i = 0; i < draw.num_costs; i++) {
        float& logit = logits[draw.cost_ids[i]];
        if (logit != -__builtin_inff()) logit = (float)clamped(logit - draw.costs[i], -MAX_LOGIT, MAX_LOGIT);
    }
}

}  // namespace BRLITE_ISA
}  // namespace brlite
