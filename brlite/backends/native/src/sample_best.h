// The best tokens of a row: the fewest whose number, or whose share of the probability, reaches an amount. Nothing is
// sorted: a histogram of the logits is narrowed until one value is left, among the blocks of tokens that matter only.
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

// Logits in blocks, and the highest of each block and of all, which is +inf where one is NaN.
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

// The tokens that survive a truncation: those above `key`, and of those at it the ids up to `last_id`. None is above
// `high`; `survivors` leaves that to its caller, since few draws have anything there.
struct Bound {
    int32_t key;
    int last_id;
    int32_t high;
};

// What a token counts for: one, or at a rate, 1 / temperature, its weight exp((logit - best) * rate).
struct Measure {
    float best;
    float rate;  // 0: each counts one
};

// Walks along shares, adding them up. Those of nothing are passed over.
struct Walk {
    double before = 0;  // the sum without the share that was added last
    double sum = 0;
    int last = -1;  // whose share that was

    bool add(int index, double share) {
        if (!(share > 0)) return false;
        before = sum;
        sum += share;
        last = index;
        return true;
    }
};

// ---- Values ------------------------------------------------------------------------------------------------------

// Integers in the order of the floats; equal for 0 and -0.
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

// -inf from the end of some values to the next multiple of 16: what is read there is no candidate for anything.
INLINE void close(float* values, int size) {
    for (int i = size; i < rounded_up(size, LANES); i++) values[i] = -__builtin_inff();
}

// The highest of some values; +inf if NaN is among them.
INLINE float highest(const float* values, int size) {
    Floats best = splat(-__builtin_inff());
    for (int i = 0; i < size; i += LANES) {
        const Floats x = load(values + i);
        best = larger_of(best, choose(is_less(x, splat(__builtin_inff())), x, splat(__builtin_inff())));
    }
    return max_of(best);
}

// A row's blocks.
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

// The blocks' maxima as values of their own, in one block.
INLINE Values maxima_of(const Values& row) { return {row.maxima, row.num_blocks(), MAX_BLOCKS, &row.best, row.best}; }

// ---- Survivors ---------------------------------------------------------------------------------------------------

// What follows the last value has its key and a higher id, so it never survives.
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

// ---- The fewest best ---------------------------------------------------------------------------------------------

struct Search {
    const Values values;
    const Measure measure;
    const Bound bound;  // what does not survive it does not count
    int32_t low, high;  // keys between which the last of the best lies
    double missing;     // of the amount, up to `high`
};

INLINE Ints within(const Search& search, Ints keys, int first_id) {
    const Ints is_outside = is_less(keys, splat_int(search.low)) | is_less(splat_int(search.high), keys);
    return survivors(search.bound, keys, first_id) & ~is_outside;
}

// Amounts by key, from `high` down, each bin 2^shift keys wide. What does not count goes to the bins after the last.
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

// Narrows the keys to the bin in which what is missing is reached; where rounding leaves it unreached, to the last bin
// that holds anything, with infinity missing from then on.
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

// Narrows to one key.
static void find_key(Search& search, double* bins) {
    while (search.low < search.high) {
        const uint32_t range = (uint32_t)search.high - (uint32_t)search.low;
        narrow(search, larger(0, 32 - __builtin_clz(range) - LOG_BINS), bins);
    }
}

// Of equals, the id with which what is missing is reached.
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

// Cuts `bound` down to the fewest best of its survivors whose amounts add up to `enough`, ties by lower id.
static Bound keep_best(const Values& row, const Measure& measure, double enough, const Bound& bound,
                       SampleScratch& scratch) {
    Search rough = {maxima_of(row), measure, {bound.key, -1, bound.high}, bound.key, bound.high, enough};
    find_key(rough, scratch.bins);
    // Where the best of each block are enough by themselves, no worse token than the last of them is wanted.
    const int32_t low = rough.missing < __builtin_inf() ? rough.low : bound.key;
    Search exact = {row, measure, bound, low, bound.high, enough};
    find_key(exact, scratch.bins);
    return {exact.low, find_id(exact), bound.high};
}

}  // namespace BRLITE_ISA
}  // namespace brlite
