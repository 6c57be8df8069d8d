// Draws a token from a row of logits, and reports logprobs:
//
// 1. logprobs are computed from the model's logits, before any edit;
// 2. biases, bans, the mask and penalties (sample_edit.h);
// 3. a greedy row takes its best token, the lowest id among equals;
// 4. other rows are truncated (sample_best.h) by top-n-sigma, top-k, typical-p, top-p, min-p and XTC, in this order,
//    each among the tokens that the steps before it left; of equal logits the lower id stays. The dynamic temperature
//    is computed from the tokens that top-k leaves;
// 5. one uniform number selects among the tokens left, in the order of their ids.
//
// Weights are exp((logit - best) / temperature): the best token weighs 1, and nothing overflows at any temperature.
#pragma once

#include "sample_best.h"
#include "sample_edit.h"

namespace brlite {
namespace BRLITE_ISA {

constexpr int NOT_FINITE = -1, NOTHING_ALLOWED = -2;  // instead of a token id
constexpr float MIN_TEMPERATURE = 1e-5f;  // of a dynamic one; equals GREEDY_BELOW of sampling_params/params.py
constexpr float MAX_TEMPERATURE = 1e37f;  // its inverse is a normal float; the distribution is uniform long before

// ---- Drawing -----------------------------------------------------------------------------------------------------

INLINE int first_best(const Values& row) {
    int found = -1;
    const int32_t best = key_of(row.best);
    visit_from(row, best, [&](int first, Floats x) INLINED {
        const Ints hits = is_equal(keys_of(x), splat_int(best));
        for (int i = LANES - 1; i >= 0; i--) found = hits[i] ? first + i : found;
        return found >= 0;
    });
    return found;
}

// Which limits exclude tokens. LOW_CUT: `min_p` and the lower end of `bound`. BAND: its upper end as well.
enum Cut { NO_CUT, LOW_CUT, BAND };

// Which tokens may be drawn, and the weight of each.
struct Odds {
    Measure measure;
    Bound bound;
    float min_p;
    Cut cut;
};

template <Cut CUT>
INLINE Floats weights_of(const Odds& odds, int first, Floats x) {
    const Floats weights = weights_of(odds.measure, x);
    if (CUT == NO_CUT) return weights;
    Ints is_kept = survivors(odds.bound, keys_of(x), first) & ~is_less(weights, splat(odds.min_p));
    if (CUT == BAND) is_kept = is_kept & ~is_less(splat_int(odds.bound.high), keys_of(x));
    return from_bits(bits_of(weights) & is_kept);
}

template <Cut CUT>
static float sum_block(const Values& row, const Odds& odds, int block) {
    Floats sum = splat(0.0f);
    for (int i = block * row.block_size; i < row.block_end(block); i += LANES)
        sum = sum + weights_of<CUT>(odds, i, load(row.values + i));
    return sum_of(sum);
}

// Writes the sum of each block's weights to `sums`. Returns the total.
static double sum_weights(const Values& row, const Odds& odds, double* sums) {
    double total = 0;
    for (int block = 0; block < row.num_blocks(); block++) {
        const bool is_empty = key_of(row.maxima[block]) < odds.bound.key;
        const auto sum = odds.cut == BAND ? sum_block<BAND> : odds.cut ? sum_block<LOW_CUT> : sum_block<NO_CUT>;
        sums[block] = is_empty ? 0 : sum(row, odds, block);
        total += sums[block];
    }
    return total;
}

// The first token of a block at which the running sum of weights exceeds `rest`.
static int pick_in_block(const Values& row, const Odds& odds, int block, double rest) {
    Walk walk;
    for (int i = block * row.block_size; i < row.block_end(block); i += LANES) {
        const Floats weights = weights_of<BAND>(odds, i, load(row.values + i));
        for (int lane = 0; lane < LANES; lane++)
            if (walk.add(i + lane, weights[lane]) && walk.sum > rest) return walk.last;
    }
    return walk.last;
}

// The best logit minus `num_sigmas` standard deviations of the logits; -inf does not count. One fixed order of sums.
static double lowest_within(const Values& row, double num_sigmas) {
    double sum = 0, squares = 0;
    int count = 0;
    for (int i = 0; i < row.size; i++) {
        const double distance = (double)row.best - row.values[i];
        if (!(distance < __builtin_inf())) continue;
        sum += distance;
        squares += distance * distance;
        count++;
    }
    const double variance = squares / count - sum / count * (sum / count);
    return row.best - num_sigmas * __builtin_sqrt(variance > 0 ? variance : 0);
}

// `key_of` the lowest float that is not below `x`.
INLINE int32_t lowest_key_from(double x) {
    const float near = (float)x;
    return key_of(near) + ((double)near < x ? 1 : 0);
}

// `key_of` the highest float that is not above `x`.
INLINE int32_t highest_key_to(double x) {
    const float near = (float)x;
    return key_of(near) - ((double)near > x ? 1 : 0);
}

INLINE float rate_of(float temperature) { return 1 / (temperature < MAX_TEMPERATURE ? temperature : MAX_TEMPERATURE); }

// The natural logarithm of a number of 1 or more: 2 artanh((m - 1) / (m + 1)) for the mantissa m around 1.
INLINE double log_of(double x) {
    int64_t bits;
    memcpy(&bits, &x, sizeof bits);
    const int64_t exponent = (bits - 0x3fe6a09e667f3bcdLL) >> 52;  // of x / sqrt(1/2)
    bits -= exponent << 52;
    memcpy(&x, &bits, sizeof x);
    const double ratio = (x - 1) / (x + 1), square = ratio * ratio;
    double series = 0;
    for (int odd = 19; odd > 0; odd -= 2) series = series * square + 1.0 / odd;
    return 2 * ratio * series + (double)exponent * 0.6931471805599453;
}

// How far the surviving tokens are below the best one.
struct Spread {
    int count = 0;  // tokens above -inf
    double mass = 0;
    double distances = 0;  // sum of weight * (best logit - logit)
};

static Spread spread_of(const Values& row, const Measure& measure, const Bound& bound) {
    Spread spread;
    visit_from(row, bound.key, [&](int first, Floats x) INLINED {
        const Ints hits = survivors(bound, keys_of(x), first) & is_less(splat(-__builtin_inff()), x);
        if (!any_of(hits)) return false;
        const Floats weights = weights_of(measure, x);
        for (int i = 0; i < LANES; i++) {
            if (!hits[i]) continue;
            spread.count++;
            spread.mass += weights[i];
            spread.distances += weights[i] * ((double)row.best - x[i]);
        }
        return false;
    });
    return spread;
}

// temperature - range + 2 * range * (entropy of the survivors / its maximum) ^ exponent, within the allowed range.
static float dynamic_temperature(const Values& row, const brlite_draw& draw, const Bound& bound) {
    const Spread spread = spread_of(row, {row.best, 1}, bound);
    const double entropy = log_of(spread.mass) + spread.distances / spread.mass;
    const double share = spread.count > 1 ? entropy / log_of(spread.count) : 0;
    const double log_power = share > 0 && share < 1 ? -log_of(1 / share) * draw.dynatemp_exponent : 0;
    const double power = share > 0 ? exp_of(splat((float)(log_power > -1e3 ? log_power : -1e3)))[0]
                                   : (draw.dynatemp_exponent > 0 ? 0 : 1);
    const double high = draw.temperature + draw.dynatemp_range, lowest = draw.temperature - draw.dynatemp_range;
    const double low = lowest > 0 ? lowest : 0, found = low + (high - low) * power;
    return (float)(found < MIN_TEMPERATURE ? MIN_TEMPERATURE : found < MAX_TEMPERATURE ? found : MAX_TEMPERATURE);
}

// `odds` limited to tokens whose distance from the best one is within `radius` of `center`.
static Odds odds_within(const Values& row, Odds odds, double center, double radius) {
    const int32_t low = lowest_key_from(row.best - (center + radius));
    if (low > odds.bound.key) odds.bound.key = low, odds.bound.last_id = row.size - 1;
    odds.bound.high = smaller(odds.bound.high, highest_key_to(row.best - (center - radius)));
    odds.cut = BAND;
    return odds;
}

// Narrows `odds` to the tokens nearest to the mean distance, as many as have the share `typical_p` of the weights.
// Finds the radius by bisection over the bits of a float.
static void keep_typical(const Values& row, double typical_p, Odds& odds, SampleScratch& scratch) {
    const Spread spread = spread_of(row, odds.measure, odds.bound);
    const double center = spread.distances / spread.mass;
    const double enough = typical_p * sum_weights(row, odds, scratch.sums);
    int32_t low = 0, high = 0x7f7fffff;  // the largest float
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        const Odds some = odds_within(row, odds, center, from_bits(splat_int(middle))[0]);
        if (sum_weights(row, some, scratch.sums) >= enough)
            high = middle;
        else
            low = middle + 1;
    }
    odds = odds_within(row, odds, center, from_bits(splat_int(low))[0]);
}

static float heaviest(const Values& row, const Odds& odds) {
    Floats found = splat(0.0f);
    visit_from(row, odds.bound.key, [&](int first, Floats x) INLINED {
        found = larger_of(found, weights_of<BAND>(odds, first, x));
        return false;
    });
    return max_of(found);
}

// XTC, "exclude top choices": excludes the tokens whose share of the weights reaches the threshold, but for the least
// likely of them.
static void exclude_top(const Values& row, double threshold, Odds& odds, SampleScratch& scratch) {
    const Floats share = splat((float)(threshold * sum_weights(row, odds, scratch.sums)));
    visit_from(row, odds.bound.key, [&](int first, Floats x) INLINED {
        const Floats weights = weights_of<BAND>(odds, first, x);
        const Ints hits = ~is_less(weights, share) & is_less(splat(0.0f), weights), keys = keys_of(x);
        if (!any_of(hits)) return false;
        for (int i = 0; i < LANES; i++)
            if (hits[i]) odds.bound.high = smaller(odds.bound.high, keys[i]);
        return false;
    });
    odds.cut = BAND;
}

// A second number in [0, 1), computed from the first: its bits, mixed by splitmix64.
INLINE double another(double uniform) {
    uint64_t bits;
    memcpy(&bits, &uniform, sizeof bits);
    bits += 0x9e3779b97f4a7c15ULL;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9ULL;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111ebULL;
    return (double)((bits ^ bits >> 31) >> 11) * 0x1p-53;
}

static Odds odds_of(const Values& row, const brlite_draw& draw, SampleScratch& scratch) {
    Odds odds = {{row.best, rate_of(draw.temperature)}, everything(row), 0, NO_CUT};
    if (draw.top_n_sigma > 0) {
        odds.bound.key = lowest_key_from(lowest_within(row, draw.top_n_sigma));
        odds.cut = LOW_CUT;
    }
    if (draw.top_k < row.size) {
        odds.bound = keep_best(row, {row.best, 0}, draw.top_k, odds.bound, scratch);
        odds.cut = LOW_CUT;
    }
    if (draw.dynatemp_range > 0) odds.measure.rate = rate_of(dynamic_temperature(row, draw, odds.bound));
    if (draw.typical_p < 1) keep_typical(row, draw.typical_p, odds, scratch);
    if (draw.top_p < 1) {
        const double mass = sum_weights(row, odds, scratch.sums);
        odds.bound = keep_best(row, odds.measure, draw.top_p * mass, odds.bound, scratch);
        if (!odds.cut) odds.cut = LOW_CUT;
    }
    if (draw.min_p > 0) {
        odds.min_p = (float)draw.min_p * (odds.cut == BAND ? heaviest(row, odds) : 1);
        if (!odds.cut) odds.cut = LOW_CUT;
    }
    if (draw.xtc_probability > 0 && another(draw.uniform) < draw.xtc_probability)
        exclude_top(row, draw.xtc_threshold, odds, scratch);
    return odds;
}

static int draw_random(const Values& row, const brlite_draw& draw, SampleScratch& scratch) {
    const Odds odds = odds_of(row, draw, scratch);
    const double target = draw.uniform * sum_weights(row, odds, scratch.sums);
    Walk walk;
    for (int block = 0; block < row.num_blocks() && walk.sum <= target; block++) walk.add(block, scratch.sums[block]);
    return pick_in_block(row, odds, walk.last, target - walk.before);
}

// ---- Logprobs ----------------------------------------------------------------------------------------------------

struct Logprobs {
    double best;
    double log_sum;  // log of the sum of weights

    float of(float logit) const { return (float)((logit - best) - log_sum); }
};

INLINE Logprobs logprobs_of(const Values& row, SampleScratch& scratch) {
    return {row.best, log_of(sum_weights(row, {{row.best, 1}, everything(row), 0, NO_CUT}, scratch.sums))};
}

INLINE bool is_better(float a, int a_id, float b, int b_id) { return a > b || (a == b && a_id < b_id); }

// Shell's sort, best first.
static void sort_best_first(float* values, int* ids, int size) {
    for (int gap = size / 2; gap > 0; gap /= 2)
        for (int i = gap; i < size; i++) {
            const float value = values[i];
            const int id = ids[i];
            int at = i;
            for (; at >= gap && is_better(value, id, values[at - gap], ids[at - gap]); at -= gap) {
                values[at] = values[at - gap];
                ids[at] = ids[at - gap];
            }
            values[at] = value;
            ids[at] = id;
        }
}

// The `num_top` best tokens with their logprobs, best first.
static void report_top(const Values& row, const Logprobs& logprobs, int num_top, brlite_drawn& drawn,
                       SampleScratch& scratch) {
    const Bound bound = keep_best(row, {row.best, 0}, num_top, everything(row), scratch);
    int num_found = 0;
    visit_from(row, bound.key, [&](int first, Floats x) INLINED {
        const Ints hits = survivors(bound, keys_of(x), first);
        if (!any_of(hits)) return false;
        for (int i = 0; i < LANES; i++)
            if (hits[i]) {
                drawn.top_ids[num_found] = first + i;
                drawn.top_logprobs[num_found++] = x[i];
            }
        return false;
    });
    sort_best_first(drawn.top_logprobs, drawn.top_ids, num_found);
    for (int i = 0; i < num_found; i++) drawn.top_logprobs[i] = logprobs.of(drawn.top_logprobs[i]);
}

// ---- A row -------------------------------------------------------------------------------------------------------

// Edits the logits and surveys them again into `row`. Saves the unedited logits in `own_logits` if logprobs are wanted.
static void edit_row(const brlite_draw& draw, float* logits, Values& row, float* own_logits, SampleScratch& scratch) {
    if (draw.num_logprobs >= 0) memcpy(own_logits, logits, row.size * sizeof *logits);
    edit_logits(draw, logits, row.size);
    row = survey(logits, row.size, scratch);
}

INLINE int token_of(const Values& row, const brlite_draw& draw, SampleScratch& scratch) {
    if (!row.is_usable()) return NOTHING_ALLOWED;
    return draw.temperature > 0 ? draw_random(row, draw, scratch) : first_best(row);
}

// Draws a token from `logits`, or reports the logprob of the token `draw.target`. Overwrites `logits` and the padding
// up to a multiple of 16. A row with NaN or +inf, or with only -inf, gives NOT_FINITE.
static void draw_token(const brlite_draw& draw, float* logits, int vocab_size, brlite_drawn& drawn,
                       const Scratch& memory) {
    SampleScratch& scratch = *(SampleScratch*)memory.sample;
    Values row = survey(logits, vocab_size, scratch);
    drawn.token = NOT_FINITE;
    drawn.logprob = __builtin_nanf("");
    if (!row.is_usable()) return;

    const bool is_reported = draw.num_logprobs >= 0 || draw.target >= 0;
    const Logprobs logprobs = is_reported ? logprobs_of(row, scratch) : Logprobs{};
    if (draw.num_logprobs > 0) report_top(row, logprobs, smaller(draw.num_logprobs, vocab_size), drawn, scratch);
    const bool is_edited = draw.target < 0 && has_edits(draw);
    if (is_edited && draw.mask && !wait_for_mask(draw)) {
        drawn.token = NOTHING_ALLOWED;
        return;
    }
    if (is_edited) edit_row(draw, logits, row, memory.own_logits, scratch);
    drawn.token = draw.target >= 0 ? draw.target : token_of(row, draw, scratch);
    const float* own_logits = is_edited ? memory.own_logits : logits;
    if (is_reported && drawn.token >= 0) drawn.logprob = logprobs.of(own_logits[drawn.token]);
}

}  // namespace BRLITE_ISA
}  // namespace brlite
