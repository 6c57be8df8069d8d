// What a step works on: the batch laid out by rows, and the memory that its operations share. Made for each run by
// engine.cpp; the kernels of every instruction set read it.
#pragma once

#include <atomic>

#include "brlite.h"

namespace brlite {

// Hands out units of work 0, 1, 2 … to whoever is free.
struct Counter {
    std::atomic<int32_t> value{0};
    int take(int num_units) { return value.fetch_add(num_units, std::memory_order_relaxed); }

    // The next of `num_units` that follow each other, from `first` to before `end`: large shares at first, single units
    // at last. False if none is left.
    bool take_share(int num_units, int num_threads, int& first, int& end) {
        first = value.load(std::memory_order_relaxed);
        do {
            if (first >= num_units) return false;
            end = first + (num_units - first + 2 * num_threads - 1) / (2 * num_threads);
        } while (!value.compare_exchange_weak(first, end, std::memory_order_relaxed));
        return true;
    }
};

// What a matrix multiplies: rows of int16 with a scale each, or of bfloat16 numbers in the form that the kernels take.
// Beside int4 matrices there is the sum of each group of integers, too.
struct Activations {
    void* rows;
    float* scales;
    long row_size;
    float* group_sums;  // [rows][row_size / BRLITE_GROUP]
};

// Rows of so many numbers together are made by each thread for itself: that takes some microseconds, and a barrier more
// where other programs use the cores.
constexpr int MAX_OWN_NUMBERS = 12288;
constexpr int TILE_ROWS = 32;  // query rows that attend together: some tokens, times the heads that share a key head
constexpr int CHUNK = BRLITE_CHUNK_PAGES * BRLITE_LANES;

// Some tokens of a span that attend together, to all they see or to one chunk of it.
struct Attending {
    int span;
    int first_token;  // of the span
    int num_tokens;
    int chunk;  // -1: all
};

// A partial result of attention: head_dim sums, the largest score, and the weights' sum.
struct Partial {
    float* sums;   // [rows][heads][chunks][head_size]
    float* peaks;  // [rows][heads][chunks]
    float* weights;
    int max_chunks;
    bool is_split;  // whether this step's attention goes through partial results
};

struct Step {
    const brlite_plan* plan;
    const brlite_batch* batch;
    const int32_t* positions;  // by row
    const int32_t* row_spans;  // by row
    const Attending* attending;
    int num_attending;
    Activations activations;  // [max_rows]
    Activations queries;      // [max_rows * num_heads]
    Partial partial;
    bool joins_rope;  // whether heads are turned and stored where they attend: no other thread attends to them
    int num_threads;
};

// A thread's own memory.
struct Scratch {
    float* row;       // the widest row
    Activations own;  // [MAX_OWN_NUMBERS / inputs]
    uint8_t* attention;
    uint8_t* sample;
    float* own_logits;  // [vocabulary]: a row as it was before edits
};

inline int rounded(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int padded_inputs(int num_inputs) { return rounded(num_inputs, BRLITE_GROUP); }
inline int head_size(const brlite_attention& attention) { return rounded(attention.head_dim, BRLITE_LANES); }

// Whether a matrix of this format is multiplied by int16 activations.
constexpr bool takes_int16(int format) { return format != BRLITE_BF16; }
constexpr bool is_int4(int format) { return format == BRLITE_INT4 || format == BRLITE_INT4_MIN; }

// The codes of a group in a panel; scales follow, and minimums where the format has them.
constexpr long code_bytes(int format) { return BRLITE_GROUP * BRLITE_LANES / (is_int4(format) ? 2 : 1); }
constexpr long group_bytes(int format) {
    return code_bytes(format) + 2 * BRLITE_LANES * (format == BRLITE_INT4_MIN ? 2 : 1);
}

inline long panel_bytes(int format, int num_inputs) {
    const long inputs = padded_inputs(num_inputs);
    return format == BRLITE_BF16 ? inputs * BRLITE_LANES * 2 : inputs / BRLITE_GROUP * group_bytes(format);
}

// A page: keys as a panel of 16 tokens, values as pairs of tokens by columns, and for int8 the scales of both.
//
//   keys    [head_size / 2][16 tokens][2]      values  [8 pairs of tokens][head_size][2]      scales  [2][16] floats
inline long page_part_bytes(int kv_format, int size) {
    return (long)size * BRLITE_LANES * (kv_format == BRLITE_INT8 ? 1 : 2);
}
inline long page_bytes(int kv_format, int head_dim) {
    const long part = page_part_bytes(kv_format, rounded(head_dim, BRLITE_LANES));
    return 2 * part + (kv_format == BRLITE_INT8 ? 2 * BRLITE_LANES * (long)sizeof(float) : 0);
}

// A page of a sequence, counted from its beginning, for one key/value head.
inline uint8_t* page_of(const brlite_attention& a, const brlite_span& span, uint8_t* layer, int page, int kv_head) {
    const long block = span.block_table[page / a.pages_per_block];
    const long number = block * a.pages_per_block + page % a.pages_per_block;
    return layer + (number * a.num_kv_heads + kv_head) * page_bytes(a.kv_format, a.head_dim);
}

}  // namespace brlite
