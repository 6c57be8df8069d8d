// Finds the best tokens of a row: the fewest whose count (top-k) or sum of probabilities (top-p) reaches an amount.
// There is no sort: a histogram of the logits is narrowed until one value is left. Blocks whose maximum is too low are
// skipped.
#pragma once

#include "rows.h"

namespace brlite {
namespace BRLITE_ISA {

constexpr int MAX_BLOCKS = 1024;
constexpr int MIN_BLOCK_SIZE = 256;
constexpr int LOG_BINS = 12;

struct SampleScratch {
    float maxima[MAX_BLOCKS];
    double sums[MAX_BLOCKS];
    double bins[(1 << LOG_BINS) + LANES];
};

// Logits in blocks, with the maximum of each block and of all. A maximum is +inf if one of its logits is NaN.
struct Values {
    const float* values;
    int size;
    int block_size;
    const float* maxima;
    float best;

    int num_blocks() const { return (size + block_size - 1) / block_size; }
    int block_end(int block) const { return smaller(size, (block + 1) * block_size); }
    bool is_usable() const { return is_finite(best); }
};

// The tokens that survive a truncation: those with a key above `key`, those at `key` with an id up to `last_id`, and
// none above `high`. `survivors` does not check `high`: draws with typical-p or XTC check it themselves.
struct Bound {
    int32_t key;
    int last_id;
    int32_t high;
};

// How much a token counts: 1 if `rate` is 0, else its weight exp((logit - best) * rate). The rate is 1 / temperature.
struct Measure {
    float best;
    float rate;  // 0: each token counts 1
};

// Adds up shares one by one. Shares of 0 are skipped.
struct Walk {
    double before = 0;  // the sum without the share that was added last
    double sum = 0;
    int last = -1;  // index of the last share that was added

    bool add(int index, double share) {
        if (!(share > 0)) return false;
        before = sum;
        sum += share;
        last = index;
        return true;
    }
};

// ---- Values ------------------------------------------------------------------------------------------------------

// Integers that compare as the floats do; equal for 0 and -0.
INLINE Ints keys_of(Floats x) {
    const Ints bits = bits_of(x + 0.0f);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

INLINE int32_t key_of(float x) { return keys_of(splat(x))[0]; }

template <class V>
INLINE bool any_of(V x) {
    if constexpr (sizeof(V) == 16)
        return ((x[0] | x[1]) | (x[2] | x[3])) != 0;
    else
        return any_of(low_half(x) | high_half(x));
}

// Writes -inf from the end of the values to the next multiple of 16: vectors that read there find no candidates.
INLINE void close(float* values, int size) {
    for (int i = size; i < rounded_up(size, LANES); i++) values[i] = -__builtin_inff();
}

// The maximum of some values; +inf if one is NaN.
INLINE float highest(const float* values, int size) {
    Floats best = splat(-__builtin_inff());
    for (int i = 0; i < size; i += LANES) {
        const Floats x = load(values + i);
        best = larger_of(best, choose(is_less(x, splat(__builtin_inff())), x, splat(__builtin_inff())));
    }
    return max_of(best);
}

// Divides a row into blocks and finds their maxima.
static Values survey(float* logits, int size, SampleScratch& scratch) {
    const int block_size = larger(MIN_BLOCK_SIZE, rounded_up((size + MAX_BLOCKS - 1) / MAX_BLOCKS, LANES));
    Values row = {logits, size, block_size, scratch.maxima, 0};
    close(logits, size);
    for (int block = 0; block < row.num_blocks(); block++)
        scratch.maxima[block] = highest(logits + block * block_size, row.block_end(block) - block * block_size);
    close(scratch.maxima, row.num_blocks());
    row.best = highest(scratch.maxima, row.num_blocks());
    return row;
}

// The maxima of the blocks as one block of values.
INLINE Values maxima_of(const Values& row) { return {row.maxima, row.num_blocks(), MAX_BLOCKS, &row.best, row.best}; }

// ---- Survivors ---------------------------------------------------------------------------------------------------

// The -inf padding after the last value has the lowest key and a higher id than `last_id`, so it never survives.
INLINE Bound everything(const Values& row) { return {key_of(-__builtin_inff()), row.size - 1, key_of(row.best)}; }

INLINE Ints survivors(const Bound& bound, Ints keys, int first_id) {
    const Ints is_in_time = ~is_less(splat_int(bound.last_id), lane_numbers() + first_id);
    return is_less(splat_int(bound.key), keys) | (is_equal(keys, splat_int(bound.key)) & is_in_time);
}

INLINE Floats weights_of(const Measure& measure, Floats x) { return exp_of((x - measure.best) * measure.rate); }

INLINE Floats amounts_of(const Measure& measure, Floats x) {
    return measure.rate > 0 ? weights_of(measure, x) : splat(1.0f);
}

// Calls visit(first id, values) for the vectors of the blocks that hold keys of `low` or more, until it returns true.
template <class Visit>
INLINE void visit_from(const Values& v, int32_t low, Visit visit) {
    for (int block = 0; block < v.num_blocks(); block++) {
        if (key_of(v.maxima[block]) < low) continue;
        for (int i = block * v.block_size; i < v.block_end(block); i += LANES)
            if (visit(i, load(v.values + i))) return;
    }
}

// ---- Keeping the best --------------------------------------------------------------------------------------------

struct Search {
    const Values values;
    const Measure measure;
    const Bound bound;  // tokens outside of it do not count
    int32_t low, high;  // the key of the worst token to keep is in [low, high]
    double missing;     // the amount that tokens up to `high` must still give
};

INLINE Ints within(const Search& search, Ints keys, int first_id) {
    const Ints is_outside = is_less(keys, splat_int(search.low)) | is_less(splat_int(search.high), keys);
    return survivors(search.bound, keys, first_id) & ~is_outside;
}

// A histogram of amounts by key, from `high` down; a bin is 2^shift keys wide. Tokens that do not count go to extra
// bins behind the last.
static void fill_bins(const Search& search, int shift, int num_bins, double* bins) {
    memset(bins, 0, num_bins * sizeof *bins);
    visit_from(search.values, search.low, [&](int first, Floats x) INLINED {
        const Ints keys = keys_of(x), hits = within(search, keys, first);
        if (!any_of(hits)) return false;
        const Ints near = shifted_right(search.high - keys, shift);
        int32_t numbers[LANES];
        float amounts[LANES];
        write(numbers, choose(hits, near, lane_numbers() + (1 << LOG_BINS)));
        store(amounts, amounts_of(search.measure, x));
        for (int i = 0; i < LANES; i++) bins[numbers[i]] += amounts[i];
        return false;
    });
}

// Narrows [low, high] to the bin in which the missing amount is reached. Rounding may leave it unreached; then to the
// last bin that is not empty, and the missing amount becomes infinity.
static void narrow(Search& search, int shift, double* bins) {
    const int num_bins = (((uint32_t)search.high - (uint32_t)search.low) >> shift) + 1;
    fill_bins(search, shift, num_bins, bins);
    Walk walk;
    bool is_reached = false;
    for (int bin = 0; bin < num_bins && !is_reached; bin++)
        is_reached = walk.add(bin, bins[bin]) && walk.sum >= search.missing;
    search.missing = is_reached ? search.missing - walk.before : __builtin_inf();
    const int64_t high = search.high - ((int64_t)larger(walk.last, 0) << shift), low = high - (1LL << shift) + 1;
    search.high = (int32_t)high;
    search.low = low > search.low ? (int32_t)low : search.low;
}

// Narrows [low, high] to one key.
static void find_key(Search& search, double* bins) {
    while (search.low < search.high) {
        const uint32_t range = (uint32_t)search.high - (uint32_t)search.low;
        narrow(search, larger(0, 32 - __builtin_clz(range) - LOG_BINS), bins);
    }
}

// Among the tokens at the key that was found: the id at which the missing amount is reached.
static int find_id(const Search& search) {
    Walk walk;
    visit_from(search.values, search.low, [&](int first, Floats x) INLINED {
        const Ints keys = keys_of(x);
        const Ints hits = survivors(search.bound, keys, first) & is_equal(keys, splat_int(search.low));
        if (!any_of(hits)) return false;
        const Floats amounts = amounts_of(search.measure, x);
        for (int i = 0; i < LANES; i++)
            if (hits[i] && walk.add(first + i, amounts[i]) && walk.sum >= search.missing) return true;
        return false;
    });
    return walk.last;
}

// Narrows `bound` to the best tokens, the fewest whose amounts add up to `enough`. Of equal logits the lower id stays.
static Bound keep_best(const Values& row, const Measure& measure, double enough, const Bound& bound,
                       SampleScratch& scratch) {
    Search rough = {maxima_of(row), measure, {bound.key, -1, bound.high}, bound.key, bound.high, enough};
    find_key(rough, scratch.bins);
    // If the maxima of the blocks alone reach `enough`, no token below the worst of those maxima is needed.
    const int32_t low = rough.missing < __builtin_inf() ? rough.low : bound.key;
    Search exact = {row, measure, bound, low, bound.high, enough};
    find_key(exact, scratch.bins);
    return {exact.low, find_id(exact), bound.high};
}

}  // namespace BRLITE_ISA
}  // namespace brlite
