// The data of a step: the batch by rows, and the memory that operations share. engine.cpp fills it for each run; the
// kernels of every instruction set read it. Also the sizes of panels and pages.
#pragma once

#include <atomic>

#include "brlite.h"

namespace brlite {

// Gives units of work 0, 1, 2 … to the threads that ask for one.
struct Counter {
    std::atomic<int32_t> value{0};
    int take(int num_units) { return value.fetch_add(num_units, std::memory_order_relaxed); }

    // Takes half of the units that are left of `num_units`: consecutive ones [first, end). Returns false if none is
    // left.
    bool take_share(int num_units, int& first, int& end) {
        first = value.load(std::memory_order_relaxed);
        do {
            if (first >= num_units) return false;
            end = first + (num_units - first + 1) / 2;
        } while (!value.compare_exchange_weak(first, end, std::memory_order_relaxed));
        return true;
    }
};

// A group of integer activations: its scale (of int16, whose rows have one, 1), the sum of its integers, that sum times
// the scale, -8 and -128, and the sums of its halves times -32. The last four are plus SUM_BIAS_BITS (grouped.h) for
// rows of int8.
struct ActivationGroup {
    float scale, sum, scaled_sum;
    int32_t minus_8_sums, minus_128_sums, minus_32_sums[2];
};

// The input of a matrix: rows of bfloat16 or of int8 activations, both in the kernels' form (`row_bytes`), or rows of
// int16 with one scale each. Rows of int8 and their `groups` are in blocks of the rows of one tile, group by group:
// [blocks][row_size / BRLITE_GROUP][block_rows]. So a tile needs one address: there are not enough registers for
// one of each row.
struct Activations {
    void* rows;
    float* scales;
    long row_size;
    ActivationGroup* groups;  // of int8; and of int16 for int4 and Q6_K matrices, [rows][row_size / BRLITE_GROUP]
    int block_rows;
    bool shares_quads;  // whether tiles of int8 share the quads of their panels (linear.h)

    // Where the first group of a row of int8 activations is. Others are `block_rows` further.
    long first_group(int row) const {
        return row / block_rows * block_rows * row_size / BRLITE_GROUP + row % block_rows;
    }
};

// At most so many rows in a block of int8 activations, and panels in a tile of a matrix.
constexpr int MAX_BLOCK_ROWS = 6, MAX_TILE_PANELS = 3;

// Up to this many numbers in all rows together, each thread computes all activations itself. That takes microseconds; a
// barrier can take longer when other programs use the cores.
constexpr int MAX_OWN_NUMBERS = 12288;

// With this many rows and more each thread takes rows of its own through all operations: rows do not move between the
// caches of cores, and threads meet for attention only. Each thread then reads all weights; so many rows that even from
// memory all threads together read less than 6 bytes a cycle (int8).
constexpr int min_divided_rows(int num_threads) { return 6 * num_threads * num_threads; }

constexpr int TILE_ROWS = 32;  // of an attention tile: tokens times query heads that share a key/value head
constexpr int CHUNK = BRLITE_CHUNK_PAGES * BRLITE_LANES;

// A work item of attention: some tokens of a span, with all chunks that they see or with one of them.
struct AttentionItem {
    int span;
    int first_token;  // of the span
    int num_tokens;
    int chunk;  // -1: all
};

// Partial results of attention: for each, head_dim sums, the largest score and the sum of weights.
struct Partial {
    float* sums;   // [rows][heads][chunks][head_size]
    float* peaks;  // [rows][heads][chunks]
    float* weights;
    int max_chunks;
    bool is_split;  // whether this step splits sequences into chunks
};

struct Step {
    const brlite_plan* plan;
    const brlite_batch* batch;
    const int32_t* positions;  // by row
    const int32_t* row_spans;  // by row
    const AttentionItem* attention_items;
    int num_attention_items;
    Activations activations;  // [max_rows]
    Activations queries;      // [max_rows * num_heads]
    Partial partial;
    bool joins_rope;    // whether ATTEND runs ROPE itself; see share_out in engine.cpp
    bool divides_rows;  // whether each thread takes rows of its own through all operations
    int num_threads;
};

// The scratch memory of one thread.
struct Scratch {
    int thread;
    float* row;       // [the widest row of the plan]
    Activations own;  // [MAX_OWN_NUMBERS / inputs]
    uint8_t* quads;   // [MAX_TILE_PANELS][the widest row of the plan][16]: of the panels of a tile (grouped.h)
    uint8_t* attention;
    uint8_t* sample;
    float* own_logits;  // [vocabulary]: a row of logits before edits
};

inline int rounded(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int padded_inputs(int num_inputs) { return rounded(num_inputs, BRLITE_GROUP); }
inline int head_size(const brlite_attention& attention) { return rounded(attention.head_dim, BRLITE_LANES); }

// Whether activations of this format are int16.
constexpr bool takes_int16(int format) { return format != BRLITE_BF16; }
constexpr bool has_blocks(int format) {
    return format == BRLITE_Q4_K || format == BRLITE_Q6_K || format == BRLITE_IQ4_XS;
}
constexpr bool has_minimums(int format) { return format == BRLITE_INT4_MIN || format == BRLITE_Q4_K; }
constexpr bool has_offsets(int format) { return has_minimums(format) || format == BRLITE_INT4_ZERO; }
constexpr bool is_int4(int format) { return format == BRLITE_INT4 || has_offsets(format); }
constexpr bool has_table(int format) {
    return format == BRLITE_IQ4_NL || format == BRLITE_IQ4_XS || format == BRLITE_MXFP4;
}

// Whether products of int16 need the sums of groups of activations.
constexpr bool needs_sums(int format) { return is_int4(format) || format == BRLITE_Q6_K || has_table(format); }

// Inputs that share a scale, and bytes of their codes in a panel. Scales follow the codes, then minimums or zero
// points, if any. A block begins with its numbers in half precision, by which its groups' scales and minimums are
// multiplied.
constexpr int group_inputs(int format) { return format == BRLITE_Q6_K ? BRLITE_GROUP / 2 : BRLITE_GROUP; }
constexpr int code_bits(int format) { return is_int4(format) || has_table(format) ? 4 : format == BRLITE_Q6_K ? 6 : 8; }
constexpr long code_bytes(int format) { return group_inputs(format) * BRLITE_LANES * code_bits(format) / 8; }
constexpr long scale_bytes(int format) { return BRLITE_LANES * (has_offsets(format) ? 2 : 1); }
constexpr long group_bytes(int format) {
    return code_bytes(format) + scale_bytes(format) * (has_blocks(format) || format == BRLITE_MXFP4 ? 1 : 2);
}
constexpr long block_head_bytes(int format) { return has_blocks(format) ? 2 * scale_bytes(format) : 0; }

// The numbers that codes of formats with a table stand for: GGML's kvalues_iq4nl, and twice those of E2M1 (OCP
// Microscaling), whose scales count half.
constexpr int NUM_CODES = 16;
constexpr int8_t IQ4_NUMBERS[NUM_CODES] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t E2M1_NUMBERS[NUM_CODES] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The bytes of a Q6_K group's sixteen inputs: three vectors of 64 have a code each in the lower 6 bits of their bytes;
// their upper 2 bits are those of a fourth. This is the vector of a pair of inputs, and the byte of each word that it
// has.
constexpr int q6_k_vector(int pair) { return pair / 4 * 2 + pair % 2; }
constexpr int q6_k_byte(int pair) { return pair / 2 % 2; }

inline long panel_bytes(int format, int num_inputs) {
    const long inputs = padded_inputs(num_inputs);
    if (format == BRLITE_BF16) return inputs * BRLITE_LANES * 2;
    return inputs / group_inputs(format) * group_bytes(format) +
           rounded(num_inputs, BRLITE_BLOCK) / BRLITE_BLOCK * block_head_bytes(format);
}

// The layout of a page of the cache: keys are a panel of 16 tokens, values are pairs of tokens by dimension. int8 pages
// have scales at the end, one for each key and each value.
//
//   keys    [head_size / 2][16 tokens][2]      values  [8 pairs of tokens][head_size][2]      scales  [2][16] floats
inline long page_part_bytes(int kv_format, int size) {
    return (long)size * BRLITE_LANES * (kv_format == BRLITE_INT8 ? 1 : 2);
}
inline long page_bytes(int kv_format, int head_dim) {
    const long part = page_part_bytes(kv_format, rounded(head_dim, BRLITE_LANES));
    return 2 * part + (kv_format == BRLITE_INT8 ? 2 * BRLITE_LANES * (long)sizeof(float) : 0);
}

// The address of a sequence's page number `page`, for one key/value head. `layer` is the layer's part of the cache.
inline uint8_t* page_of(const brlite_attention& a, const brlite_span& span, uint8_t* layer, int page, int kv_head) {
    const long block = span.block_table[page / a.pages_per_block];
    const long number = block * a.pages_per_block + page % a.pages_per_block;
    return layer + (number * a.num_kv_heads + kv_head) * page_bytes(a.kv_format, a.head_dim);
}

}  // namespace brlite
