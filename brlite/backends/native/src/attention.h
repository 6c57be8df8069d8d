// ATTEND: attention over the paged cache.
//
// A sequence is processed in chunks of 256 positions, counted from its start. Each chunk gives a partial result
// (largest score, sum of weights, weighted sum of values). The partial results are merged in order of position. So the
// result of a row depends only on its position and on the keys and values it may see, not on the number of rows in the
// step or the number of threads.
// Online softmax: Milakov & Gimelshein 2018; chunks as in FlashDecoding, Dao et al. 2023.
#pragma once

#include "rope.h"

namespace brlite {
namespace BRLITE_ISA {

// Whether weights of some rows are computed between the products of others: by units that do not multiply, at the same
// time. A Zen 4 has such units. An Ice Lake adds and multiplies vectors of 64 bytes in the same ones (1.00x). AVX2 has
// too few registers for it (0.92x).
#if defined(BRLITE_HAS_BF16)
constexpr bool OVERLAPS = true;
#else
constexpr bool OVERLAPS = false;
#endif
constexpr int PAGES_AT_ONCE = OVERLAPS ? 2 : 1;  // of weights

// Pages, or columns of values, that a tile multiplies at once. With four, 24 of 32 registers are sums, and a broadcast
// number of a query serves four products (bench/kernels.md, "Loads limit a tile").
#if defined(BRLITE_HAS_AVX512) && !defined(BRLITE_HAS_BF16)
constexpr int panels_of_attention(int) { return 4; }
#else
constexpr int panels_of_attention(int num_rows) { return panels_at_once(num_rows); }
#endif
constexpr int CACHED_PANELS = larger(2, panels_of_attention(MAX_ROWS));  // for all rows, before the next ones

// One thread's scratch memory. A row is one query head of one token; rows that share a key/value head form a tile.
struct AttentionScratch {
    float scores[TILE_ROWS][CHUNK] __attribute__((aligned(64)));
    // By lane of a page. The largest score is that of the tokens that the row may see.
    float lane_scores[TILE_ROWS][LANES] __attribute__((aligned(64)));
    float lane_sums[TILE_ROWS][LANES] __attribute__((aligned(64)));           // of weights
    float lane_magnitudes[TILE_ROWS][LANES] __attribute__((aligned(64)));     // of int8: of weights times value scales
    float sums[TILE_ROWS][BRLITE_MAX_HEAD_DIM] __attribute__((aligned(64)));  // of the current chunk
    float totals[TILE_ROWS][BRLITE_MAX_HEAD_DIM] __attribute__((aligned(64)));  // of all chunks so far
    union {
        int16_t ints[TILE_ROWS][CHUNK];
        Bf16::Row bf16[TILE_ROWS][CHUNK];
    } weights __attribute__((aligned(64)));
    union {
        int16_t ints[TILE_ROWS][BRLITE_MAX_HEAD_DIM];
        Bf16::Row bf16[TILE_ROWS][BRLITE_MAX_HEAD_DIM];
    } queries __attribute__((aligned(64)));
    float query_scales[TILE_ROWS];
    float weight_scales[TILE_ROWS];
    float peaks[TILE_ROWS], total_peaks[TILE_ROWS];
    float weight_sums[TILE_ROWS], total_weights[TILE_ROWS];
    unsigned next_page, end_page;  // whose weights are computed next, counted through the pages of all rows
    const uint8_t* pages[BRLITE_CHUNK_PAGES];
};

// The rows of one tile, the current chunk, and which tokens of the chunk each row may see.
struct AttentionTile {
    const brlite_attention& a;
    AttentionScratch& s;
    int num_rows;
    int group;           // query heads per token
    int first_position;  // of the first token
    int window;
    int chunk_start;
    int num_pages;               // pages of the chunk, up to the last page that any row sees
    int first_whole, end_whole;  // the pages that all rows see whole

    int position(int row) const { return first_position + row / group; }
    int end(int row) const { return smaller(CHUNK, position(row) + 1 - chunk_start); }
    int begin(int row) const { return window ? larger(0, position(row) + 1 - window - chunk_start) : 0; }
    bool are_whole(int first_page, int end_page) const { return first_whole <= first_page && end_page <= end_whole; }
};

INLINE int16_t* query_rows(AttentionScratch& s, Int8) { return s.queries.ints[0]; }
INLINE Bf16::Row* query_rows(AttentionScratch& s, Bf16) { return s.queries.bf16[0]; }
INLINE int16_t* weight_rows(AttentionScratch& s, Int8) { return s.weights.ints[0]; }
INLINE Bf16::Row* weight_rows(AttentionScratch& s, Bf16) { return s.weights.bf16[0]; }

INLINE const float* page_scales(const AttentionTile& at, int page) {
    return (const float*)(at.s.pages[page] + 2 * page_part_bytes(BRLITE_INT8, head_size(at.a)));
}

constexpr float NOTHING = -__builtin_inff();  // lower than any score

INLINE Ints sees(const AttentionTile& at, int row, int token) {
    const Ints tokens = lane_numbers() + token;
    return is_less(tokens, splat_int(at.end(row))) & ~is_less(tokens, splat_int(at.begin(row)));
}

// lane_scores[row] becomes the largest score of these pages, too, among those that the row may see.
INLINE void find_largest(const AttentionTile& at, int row, int first_page, int end_page) {
    Floats largest = load(at.s.lane_scores[row]);
    for (int page = first_page; page < end_page; page++) {
        const Floats scores = load(at.s.scores[row] + page * LANES);
        largest = larger_of(largest, choose(sees(at, row, page * LANES), scores, splat(NOTHING)));
    }
    store(at.s.lane_scores[row], largest);
}

// scores[rows][pages * 16] = queries times keys, in int8 without the query's scale.
template <class Kind, int ROWS, int PAGES>
static void score_tile(const AttentionTile& at, int first_row, int first_page) {
    typename Kind::Sum sums[1][ROWS][PAGES];
    const uint8_t* keys[PAGES];
    const long part = page_part_bytes(at.a.kv_format, head_size(at.a));
    UNROLLED for (int p = 0; p < PAGES; p++) keys[p] = at.s.pages[first_page + p];
    clear<Kind>(sums[0]);
    add_pairs<Kind>(sums, keys, Kind::PAIR_BYTES, query_rows(at.s, Kind()) + first_row * BRLITE_MAX_HEAD_DIM,
                    BRLITE_MAX_HEAD_DIM, head_size(at.a) / 2);
    float* to = at.s.scores[first_row] + first_page * LANES;
    float* best = at.s.lane_scores[first_row];
    const bool are_whole = at.are_whole(first_page, first_page + PAGES);
    UNROLLED for (int r = 0; r < ROWS; r++, to += CHUNK, best += LANES) {
        Floats largest = load(best);
        UNROLLED for (int p = 0; p < PAGES; p++) {
            Floats scores = Kind::floats(sums[0][r][p]);
            if constexpr (Kind::IS_INT8) scores = scores * load((const float*)(keys[p] + 2 * part));
            largest = larger_of(largest, scores);
            store(to + p * LANES, scores);
        }
        if (are_whole) store(best, largest);
    }
    for (int r = 0; r < ROWS && !are_whole; r++) find_largest(at, first_row + r, first_page, first_page + PAGES);
}

// Stores weights that are bfloat16 numbers in the form that multiplies bfloat16 values.
INLINE void store_weights(Bf16::Row* to, Floats weights) {
#if defined(BRLITE_HAS_BF16)
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)weights));
#else
    store_row(to, weights);
#endif
}

// Stores a row's weights of one page in the form that multiplies values; 0 for tokens that the row may not see. Adds
// them to `sum`. In int8, `magnitude` becomes the largest one of weights times the scales of values.
template <bool IS_INT8, bool SEES_ALL>
INLINE void store_page(const AttentionTile& at, int row, int page, Floats weights, Floats& sum, Ints& magnitude) {
    AttentionScratch& s = at.s;
    const Ints seen = SEES_ALL ? Ints{} : sees(at, row, page * LANES);
    if (!SEES_ALL) weights = choose(seen, weights, Floats{});
    sum = sum + weights;
    if constexpr (!IS_INT8) return store_weights(s.weights.bf16[row] + page * LANES, weights);
    weights = weights * load(page_scales(at, page) + LANES);
    if (!SEES_ALL) weights = choose(seen, weights, Floats{});  // again, as the scales of unseen tokens may be NaN
    magnitude = larger_magnitude(magnitude, weights);
    store(s.scores[row] + page * LANES, weights);
}

// Of 2, relative to the row's largest one: exactly 0 for that, so the scale of an int8 query is no fused multiply-add.
template <bool IS_INT8>
INLINE Floats exponents(const AttentionTile& at, int row, const float* scores) {
    const Floats scaled = IS_INT8 ? load(scores) * at.s.query_scales[row] : load(scores);
    return scaled - at.s.peaks[row];
}

template <bool IS_INT8, bool SEES_ALL>
INLINE void weigh_page(const AttentionTile& at, int row, int page, Floats& sum, Ints& magnitude) {
    const Floats weights = power_of_2<!IS_INT8>(exponents<IS_INT8>(at, row, at.s.scores[row] + page * LANES));
    store_page<IS_INT8, SEES_ALL>(at, row, page, weights, sum, magnitude);
}

// Turns a row's scores into weights 2^(score - peak + 1/2).
template <bool IS_INT8>
INLINE void weigh(const AttentionTile& at, int row) {
    Floats sum = splat(0.0f);
    Ints magnitude = Ints{};
    int page = 0;
    for (; page < at.first_whole; page++) weigh_page<IS_INT8, false>(at, row, page, sum, magnitude);
    _Pragma("GCC unroll 4") for (; page < at.end_whole; page++)
        weigh_page<IS_INT8, true>(at, row, page, sum, magnitude);
    for (; page < at.num_pages; page++) weigh_page<IS_INT8, false>(at, row, page, sum, magnitude);
    store(at.s.lane_sums[row], sum);
    store(at.s.lane_magnitudes[row], from_bits(magnitude));
}

template <bool IS_INT8>
INLINE void begin_rows(const AttentionTile& at, int first, int end) {
    AttentionScratch& s = at.s;
    for (int row = first; row < end; row++) {
        s.peaks[row] = max_of(load(s.lane_scores[row])) * (IS_INT8 ? s.query_scales[row] : 1.0f);
        store(s.lane_sums[row], Floats{});
        store(s.lane_magnitudes[row], Floats{});
    }
}

template <bool IS_INT8>
INLINE void finish_rows(const AttentionTile& at, int first, int end) {
    AttentionScratch& s = at.s;
    for (int row = first; row < end; row++) s.weight_sums[row] = sum_of(load(s.lane_sums[row]));
    for (int row = first; row < end && IS_INT8; row++) {
        const float largest = largest_magnitude(bits_of(load(s.lane_magnitudes[row])));
        s.weight_scales[row] = quantize_row(s.scores[row], at.num_pages * LANES, largest, s.weights.ints[row]);
    }
}

template <bool IS_INT8>
INLINE void weigh_rows(const AttentionTile& at, int first, int end) {
    begin_rows<IS_INT8>(at, first, end);
    for (int row = first; row < end; row++) weigh<IS_INT8>(at, row);
    finish_rows<IS_INT8>(at, first, end);
}

// Computes x here. GCC would move the operations to where their result is used.
INLINE void compute_now(Floats& x) {
#if defined(BRLITE_HAS_AVX512)
    asm volatile("" : "+v"(x));
#elif defined(BRLITE_HAS_AVX2)
    asm volatile("" : "+x"(x.low), "+x"(x.high));
#else
    (void)x;
#endif
}

// As `weigh` for rows that see the whole chunk, between other operations: weights of pages `next_page` to `end_page`.
// Each call does one quarter of the work of PAGES_AT_ONCE pages.
template <bool IS_INT8>
struct NextWeights {
    const AttentionTile& at;
    PowerOf2<!IS_INT8> powers[PAGES_AT_ONCE];

    INLINED void operator()(int quarter) {
        UNROLLED for (int i = 0; i < PAGES_AT_ONCE; i++) compute(powers[i], at.s.next_page + i, quarter);
        if (quarter == 3) at.s.next_page += PAGES_AT_ONCE;
    }

    INLINED void compute(PowerOf2<!IS_INT8>& power, unsigned page, int quarter) {
        const unsigned row = page / BRLITE_CHUNK_PAGES;
        if (quarter == 0) {
            power.begin(exponents<IS_INT8>(at, row, at.s.scores[0] + page * LANES));
            compute_now(power.shifted);
        } else if (quarter == 1) {
            power.reduce();
            compute_now(power.series);
        } else if (quarter == 2) {
            power.evaluate();
            compute_now(power.series);
        } else {
            Floats sum = load(at.s.lane_sums[row]);
            Ints magnitude = bits_of(load(at.s.lane_magnitudes[row]));
            store_page<IS_INT8, true>(at, row, page % BRLITE_CHUNK_PAGES, power.value(), sum, magnitude);
            store(at.s.lane_sums[row], sum);
            if (IS_INT8) store(at.s.lane_magnitudes[row], from_bits(magnitude));
        }
    }
};

// sums[rows][columns * 16] = weights times values, over all pages of the chunk. Meanwhile computes the next weights.
template <class Kind, int ROWS, int COLUMNS>
static void value_tile(const AttentionTile& at, int first_row, int first_column) {
    const int size = head_size(at.a);
    const long skipped = page_part_bytes(at.a.kv_format, size) + first_column * Kind::PAIR_BYTES;
    const long stride = size / LANES * Kind::PAIR_BYTES;
    const typename Kind::Row* weights = weight_rows(at.s, Kind()) + first_row * CHUNK;
    typename Kind::Sum sums[1][ROWS][COLUMNS];
    clear<Kind>(sums[0]);
    for (int page = 0; page < at.num_pages; page++, weights += LANES) {
        const uint8_t* values[COLUMNS];
        UNROLLED for (int c = 0; c < COLUMNS; c++) values[c] = at.s.pages[page] + skipped + c * Kind::PAIR_BYTES;
        if (OVERLAPS && ROWS >= MAX_ROWS - 1 && at.s.next_page < at.s.end_page)
            add_pairs<Kind>(sums, values, stride, weights, CHUNK, LANES / 2, NextWeights<Kind::IS_INT8>{at, {}});
        else
            add_pairs<Kind>(sums, values, stride, weights, CHUNK, LANES / 2);
    }
    store_sums<Kind>(sums[0], &at.s.sums[first_row][first_column * LANES], BRLITE_MAX_HEAD_DIM);
}

enum class Part { SCORES, VALUES };

// SCORES: ROWS rows times pages [first, end) of the chunk. VALUES: the same rows times value columns [first, end).
// PANELS at a time; the rest half as many at a time.
template <class Kind, int ROWS, int PANELS>
static void multiply_rows(const AttentionTile& at, Part part, int first_row, int first, int end) {
    for (; first + PANELS <= end; first += PANELS)
        part == Part::SCORES ? score_tile<Kind, ROWS, PANELS>(at, first_row, first)
                             : value_tile<Kind, ROWS, PANELS>(at, first_row, first);
    if constexpr (PANELS > 1) multiply_rows<Kind, ROWS, PANELS / 2>(at, part, first_row, first, end);
}

// The same for any number of rows up to MAX_ROWS.
template <class Kind>
INLINE void multiply_block(const AttentionTile& at, Part part, int first_row, int end_row, int first, int end) {
    typedef void (*Rows)(const AttentionTile&, Part, int, int, int);
    static const Rows rows[6] = {
        multiply_rows<Kind, 1, panels_of_attention(1)>, multiply_rows<Kind, 2, panels_of_attention(2)>,
        multiply_rows<Kind, 3, panels_of_attention(3)>, multiply_rows<Kind, 4, panels_of_attention(4)>,
        multiply_rows<Kind, 5, panels_of_attention(5)>, multiply_rows<Kind, 6, panels_of_attention(6)>};
    rows[end_row - first_row - 1](at, part, first_row, first, end);
}

// All rows of the tile, in blocks of up to MAX_ROWS. The first row of block b is first_of_block(b).
INLINE int num_blocks(const AttentionTile& at) { return (at.num_rows + MAX_ROWS - 1) / MAX_ROWS; }
INLINE int first_of_block(const AttentionTile& at, int b) { return at.num_rows * b / num_blocks(at); }

template <class Kind>
INLINE void multiply_tile(const AttentionTile& at, Part part) {
    const int count = part == Part::SCORES ? at.num_pages : head_size(at.a) / LANES;
    const int blocks = num_blocks(at), num_panels = blocks == 1 ? count : CACHED_PANELS;
    for (int panel = 0; panel < count; panel += num_panels)
        for (int b = 0; b < blocks; b++)
            multiply_block<Kind>(at, part, first_of_block(at, b), first_of_block(at, b + 1), panel,
                                 smaller(count, panel + num_panels));
}

// Weights, and weights times values, of a chunk that all rows see whole. The weights of a block are computed while the
// block before it is multiplied.
template <class Kind>
INLINE void weigh_and_multiply(const AttentionTile& at) {
    AttentionScratch& s = at.s;
    const int blocks = num_blocks(at);
    weigh_rows<Kind::IS_INT8>(at, 0, first_of_block(at, 1));
    for (int b = 0; b < blocks; b++) {
        const int first = first_of_block(at, b), end = first_of_block(at, b + 1);
        const int next_end = first_of_block(at, smaller(b + 2, blocks));
        begin_rows<Kind::IS_INT8>(at, end, next_end);
        s.next_page = end * BRLITE_CHUNK_PAGES;
        s.end_page = next_end * BRLITE_CHUNK_PAGES;
        multiply_block<Kind>(at, Part::VALUES, first, end, 0, head_size(at.a) / LANES);
        for (NextWeights<Kind::IS_INT8> weigh{at, {}}; s.next_page < s.end_page;)  // what is left
            for (int quarter = 0; quarter < 4; quarter++) weigh(quarter);
        finish_rows<Kind::IS_INT8>(at, end, next_end);
    }
}

// Attention of all rows over one chunk: fills peaks, weight_sums and sums.
template <class Kind>
INLINE void attend_chunk(const AttentionTile& at) {
    AttentionScratch& s = at.s;
    for (int row = 0; row < at.num_rows; row++) store(s.lane_scores[row], splat(NOTHING));
    multiply_tile<Kind>(at, Part::SCORES);
    s.next_page = s.end_page = 0;
    if (OVERLAPS && at.are_whole(0, BRLITE_CHUNK_PAGES)) {
        weigh_and_multiply<Kind>(at);
    } else {
        weigh_rows<Kind::IS_INT8>(at, 0, at.num_rows);
        multiply_tile<Kind>(at, Part::VALUES);
    }
    if (!Kind::IS_INT8) return;
    for (int row = 0; row < at.num_rows; row++)
        for (int i = 0; i < head_size(at.a); i += LANES)
            store(s.sums[row] + i, load(s.sums[row] + i) * s.weight_scales[row]);
}

// 2^(peak - best): the factor that makes results relative to `best` of results relative to `peak`.
INLINE Floats rescaling(Floats peak, Floats best) { return exp_of((peak - best) * LN_2); }

// Adds the partial result of one more chunk to the total of a row.
INLINE void add_part(float* total, float& total_weight, float old_factor, const float* sums, float weight,
                     float new_factor, int size) {
    total_weight = total_weight * old_factor + weight * new_factor;
    for (int i = 0; i < size; i += LANES) store(total + i, load(total + i) * old_factor + load(sums + i) * new_factor);
}

// Adds the results of the current chunk to the totals.
INLINE void merge_chunk(const AttentionTile& at) {
    AttentionScratch& s = at.s;
    float best[TILE_ROWS], old_factors[TILE_ROWS], new_factors[TILE_ROWS];
    for (int i = 0; i < at.num_rows; i += LANES) {
        const Floats peak = load(s.peaks + i), total_peak = load(s.total_peaks + i);
        const Floats larger = larger_of(total_peak, peak);
        store(best + i, larger);
        store(old_factors + i, rescaling(total_peak, larger));
        store(new_factors + i, rescaling(peak, larger));
    }
    for (int row = 0; row < at.num_rows; row++) {
        if (at.begin(row) >= at.end(row)) continue;
        add_part(s.totals[row], s.total_weights[row], old_factors[row], s.sums[row], s.weight_sums[row],
                 new_factors[row], head_size(at.a));
        s.total_peaks[row] = best[row];
    }
}

INLINE void begin_total(float* total, float& total_peak, float& total_weight, int size) {
    total_peak = NOTHING;
    total_weight = 0.0f;
    memset(total, 0, size * sizeof *total);
}

INLINE void write_total(const Step& step, const brlite_operation& op, int row, int head, const float* total,
                        float weight) {
    const brlite_attention& a = step.plan->attention;
    float* out = op.output + (long)row * op.row_size + head * a.head_dim;
    const float inverse = 1.0f / weight;
    for (int i = 0; i < a.head_dim; i++) out[i] = total[i] * inverse;
}

INLINE void load_queries(const Step& step, const AttentionTile& at, int first_row, int first_head) {
    const brlite_attention& a = at.a;
    const long element = a.kv_format == BRLITE_INT8 ? sizeof(Int8::Row) : sizeof(Bf16::Row);
    for (int row = 0; row < at.num_rows; row++) {
        const long from = (long)(first_row + row / at.group) * a.num_heads + first_head + row % at.group;
        void* to = a.kv_format == BRLITE_INT8 ? (void*)at.s.queries.ints[row] : (void*)at.s.queries.bf16[row];
        memcpy(to, (const uint8_t*)step.queries.rows + from * step.queries.row_size * element, head_size(a) * element);
        at.s.query_scales[row] = step.queries.scales[from];
    }
}

INLINE void find_pages(const Step& step, const brlite_operation& op, const AttentionItem& item, AttentionTile& at,
                       int kv_head) {
    const brlite_span& span = step.batch->spans[item.span];
    const int last = at.first_position + item.num_tokens - 1;
    at.num_pages = smaller(BRLITE_CHUNK_PAGES, (last - at.chunk_start) / LANES + 1);
    at.first_whole = smaller(at.num_pages, (at.begin(at.num_rows - 1) + LANES - 1) / LANES);
    at.end_whole = larger(at.first_whole, at.end(0) / LANES);
    for (int page = 0; page < at.num_pages; page++)
        at.s.pages[page] = page_of(at.a, span, op.pages, at.chunk_start / LANES + page, kv_head);
}

// Attention of some tokens, for query heads that share one key/value head.
INLINE void attend_heads(const Step& step, const brlite_operation& op, const AttentionItem& item, AttentionScratch& s,
                         int kv_head, int first_head, int num_heads) {
    const brlite_attention& a = step.plan->attention;
    const brlite_span& span = step.batch->spans[item.span];
    const int first_row = span.first_row + item.first_token, size = head_size(a);
    AttentionTile at = {a, s, item.num_tokens * num_heads, num_heads, span.start + item.first_token, op.window};
    load_queries(step, at, first_row, first_head);
    for (int row = 0; row < at.num_rows; row++)
        begin_total(s.totals[row], s.total_peaks[row], s.total_weights[row], size);
    const int last = at.first_position + item.num_tokens - 1;
    const int first_seen = op.window ? larger(0, at.first_position + 1 - op.window) : 0;
    const int first_chunk = item.chunk >= 0 ? item.chunk : first_seen / CHUNK;
    const int last_chunk = item.chunk >= 0 ? item.chunk : last / CHUNK;
    for (int chunk = first_chunk; chunk <= last_chunk; chunk++) {
        at.chunk_start = chunk * CHUNK;
        find_pages(step, op, item, at, kv_head);
        a.kv_format == BRLITE_INT8 ? attend_chunk<Int8>(at) : attend_chunk<Bf16>(at);
        merge_chunk(at);
    }
    for (int row = 0; row < at.num_rows; row++) {
        const int to_row = first_row + row / num_heads, head = first_head + row % num_heads;
        if (item.chunk < 0) {
            write_total(step, op, to_row, head, s.totals[row], s.total_weights[row]);
            continue;
        }
        const long index = ((long)to_row * a.num_heads + head) * step.partial.max_chunks + item.chunk;
        memcpy(step.partial.sums + index * size, s.sums[row], size * sizeof(float));
        step.partial.peaks[index] = s.peaks[row];
        step.partial.weights[index] = s.weight_sums[row];
    }
}

// A unit is one work item times one key/value head. With `rope_op`, ROPE runs for the unit's heads first.
static void attend_unit(const Step& step, const brlite_operation& op, const brlite_operation* rope_op,
                        AttentionScratch& s, int unit) {
    const brlite_attention& a = step.plan->attention;
    const int group = a.num_heads / a.num_kv_heads, kv_head = unit % a.num_kv_heads;
    const AttentionItem& item = step.attention_items[unit / a.num_kv_heads];
    const int first_row = step.batch->spans[item.span].first_row + item.first_token;
    for (int i = 0; rope_op && i < item.num_tokens; i++) rope_head(step, *rope_op, first_row + i, kv_head);
    for (int first = 0; first < group; first += TILE_ROWS)
        attend_heads(step, op, item, s, kv_head, kv_head * group + first, smaller(TILE_ROWS, group - first));
}

// Merges the partial results of a row's chunks, in order, where ATTEND has split a sequence among threads.
INLINE void merge_row(const Step& step, const brlite_operation& attend_op, int row) {
    const brlite_attention& a = step.plan->attention;
    const int size = head_size(a), position = step.positions[row], window = attend_op.window;
    const int first_chunk = window ? larger(0, position + 1 - window) / CHUNK : 0;
    float total[BRLITE_MAX_HEAD_DIM] __attribute__((aligned(64)));
    for (int head = 0; head < a.num_heads; head++) {
        float peak, weight;
        begin_total(total, peak, weight, size);
        for (int chunk = first_chunk; chunk <= position / CHUNK; chunk++) {
            const long index = ((long)row * a.num_heads + head) * step.partial.max_chunks + chunk;
            const float part_peak = step.partial.peaks[index], best = part_peak > peak ? part_peak : peak;
            add_part(total, weight, rescaling(splat(peak), splat(best))[0], step.partial.sums + index * size,
                     step.partial.weights[index], rescaling(splat(part_peak), splat(best))[0], size);
            peak = best;
        }
        write_total(step, attend_op, row, head, total, weight);
    }
}

}  // namespace BRLITE_ISA
}  // namespace brlite
