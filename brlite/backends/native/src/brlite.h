// The plain C interface of the native kernels: everything that crosses between Python (abi.py, by ctypes) and C++.
//
// The library knows operations, not models. A plan is a flat array of operations with pointers to their tensors, made
// once; `brlite_run` computes it for a batch of tokens, prompt chunks and decodes mixed, and draws the next tokens.
//
// Every result is a function of its own row alone: the same bits for any batch, chunk borders, number of threads and
// instruction set. Integer sums are exact; float sums run in one fixed order; products of bfloat16 numbers are exact.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define BRLITE_ABI_VERSION 8
#define BRLITE_KERNEL_VERSION 1  // counts up whenever a change of the kernels changes results

#define BRLITE_LANES 16        // outputs in a panel of a matrix, and tokens in a page of the cache
#define BRLITE_GROUP 32        // inputs that share one scale in a matrix of integers
#define BRLITE_CHUNK_PAGES 16  // attention works on 256 tokens at a time
#define BRLITE_MAX_HEAD_DIM 256
#define BRLITE_HEAD_ROWS 32  // rows whose logits are held at once

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

enum brlite_isa {
    BRLITE_GENERIC,
    BRLITE_AVX2,
    BRLITE_AVX512,  // f, bw, vl, dq
    BRLITE_AVX512_VNNI,
    BRLITE_AVX512_BF16,  // with VNNI
    BRLITE_NUM_ISAS,
};

// How numbers are held. Rows of activations are bfloat16 beside BF16, and int16 with a scale a row beside the others:
// one plan has the one or the other. In a group of the last three a weight is
//   INT8_F16   scale * code, -128 .. 127      INT4   scale * (code - 8), 0 .. 15      INT4_MIN   scale * code + minimum
// with a scale and a minimum in IEEE half precision: what quantised files hold, digit by digit.
enum brlite_format { BRLITE_INT8, BRLITE_BF16, BRLITE_INT8_F16, BRLITE_INT4, BRLITE_INT4_MIN, BRLITE_NUM_FORMATS };

enum brlite_kind {
    BRLITE_EMBED,     // weight: panels or table [vocabulary][num_outputs]  ->  output [rows][num_outputs]
    BRLITE_NORM,      // input [rows][num_inputs], weight [num_inputs]      ->  activations
    BRLITE_LINEAR,    // activations, weight: panels, bias or null          ->  output [rows][num_outputs]
    BRLITE_ADD,       // the same, added to what output holds
    BRLITE_ROPE,      // input: q, k and v of each row; weight and bias: null, or the norms of a query and of a key head
                      //   ->  queries turned in their first num_inputs dimensions, keys so and values in the cache
    BRLITE_ATTEND,    // queries and cache              ->  output [rows][num_heads * head_dim]
    BRLITE_QUANTIZE,  // input [rows][num_inputs]       ->  activations
    BRLITE_SILU,      // input [rows][2 * num_inputs]: gate, up  ->  activations silu(gate) * up
    BRLITE_GATE,      // the same                            ->  output [rows][num_inputs]
};

// One step of a plan. Sizes are in elements; `row_size` is the distance of two rows of `input` or `output`.
// Rows of float buffers start at multiples of 16 elements, and what lies between a row's end and the next is zero.
typedef struct brlite_operation {
    int32_t kind;
    int32_t format;  // of the matrix, or of the activations to write
    int32_t num_outputs;
    int32_t num_inputs;
    int32_t row_size;
    int32_t is_table;  // EMBED: a plain bfloat16 table in place of panels
    int32_t window;    // ATTEND: tokens to look back, 0 for all
    float epsilon;     // NORM, ROPE
    int32_t first;     // EMBED: the weight has tokens `first` to `first + count - 1`; of others nothing is written
    int32_t count;
    int32_t output_row_size;  // GATE
    int32_t meets;            // afterwards all ranks meet: the next operation reads what they have written
    int32_t is_part;          // LINEAR, ADD: the next operation gives more outputs of the same product
    int32_t reserved;
    const void* weight;
    const float* bias;
    const float* input;
    float* output;
    uint8_t* pages;  // ROPE, ATTEND: the layer's part of the cache
} brlite_operation;

// What all layers' attention has in common. `cos` and `sin` are [max_positions][rotary_dim / 2].
typedef struct brlite_attention {
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;  // even
    int32_t rotary_dim;
    int32_t is_interleaved;  // neighbours turn against each other, not halves
    int32_t kv_format;
    int32_t pages_per_block;
    int32_t max_positions;
    float softmax_scale;
    int32_t reserved;
    const float* cos;
    const float* sin;
} brlite_attention;

// A run of one sequence's tokens: positions start .. start + num_rows - 1, whose rows follow each other.
typedef struct brlite_span {
    int32_t start;
    int32_t first_row;
    int32_t num_rows;
    int32_t reserved;
    const int32_t* block_table;
} brlite_span;

// How one token is drawn, or with `target` >= 0 reported; see sample.h. Arrays may be null where their count is 0.
typedef struct brlite_draw {
#define FIELD(type, name) type name;
#define PARAMETER FIELD
#include "draw_fields.h"
#undef PARAMETER
#undef FIELD
} brlite_draw;

// What came of it. `top_ids` and `top_logprobs` have room for `num_logprobs`. Without finite logits `token` is -1, and
// -2 where edits leave nothing to draw.
typedef struct brlite_drawn {
    int32_t token;
    float logprob;
    int32_t* top_ids;
    float* top_logprobs;
} brlite_drawn;

// Ranks are processes that compute one plan together, on one machine. Each has some heads, and some outputs of every
// matrix that follows: what an operation reads whole is in memory that all ranks share, and each writes its columns.
// So sums are never split: a plan gives the same bits on any number of ranks.
typedef struct brlite_meeting brlite_meeting;

// A plan. `body` runs for all rows; then, for up to 32 of the drawing rows at a time, `norm` (a NORM that reads
// `hidden`) and `head` (a LINEAR) give logits [32][row_size], from which the tokens are drawn.
typedef struct brlite_plan {
    const brlite_operation* body;
    int32_t num_operations;
    int32_t max_rows;
    int32_t vocab_size;
    int32_t max_blocks;  // of the cache: for checks only
    brlite_attention attention;
    brlite_operation norm;
    brlite_operation head;
    float* logits;            // [32][head.row_size]: where head.output is a part of
    brlite_meeting* meeting;  // null, or where ranks meet
    int32_t num_ranks;
    int32_t rank;  // 0 draws
} brlite_plan;

// The hidden states of some rows, as `norm` gives them: added to `total` [hidden], a row after the other, in float64.
// So a prompt that comes in chunks has the bits of one that comes whole.
typedef struct brlite_pooling {
    int32_t first_row;
    int32_t num_rows;
    double* total;
} brlite_pooling;

typedef struct brlite_batch {
    int32_t num_rows;
    int32_t num_spans;
    int32_t num_draws;
    int32_t num_threads;       // how many of the engine's compute; 0: all
    const int32_t* token_ids;  // [num_rows]
    const brlite_span* spans;
    const brlite_draw* draws;
    brlite_drawn* drawn;
    float* logits;  // null, or [num_draws][vocab_size] to be filled
    const brlite_pooling* poolings;
    int32_t num_poolings;
    int32_t reserved;
} brlite_batch;

typedef struct brlite_engine brlite_engine;

int32_t brlite_abi_version(void);
int32_t brlite_kernel_version(void);
size_t brlite_struct_size(int32_t which);   // in the order of abi.py's STRUCTS, which checks them
int32_t brlite_isa_available(int32_t isa);  // whether this processor, and this build, has it
// 0: the same bits as the generic kernels; else the number of the check that failed.
int32_t brlite_self_test(int32_t isa);

// Memory in large pages where the system has them, zero. Null if it cannot be had.
void* brlite_allocate(size_t num_bytes);
void brlite_release(void* memory, size_t num_bytes);

// Bytes of a packed matrix; inputs and outputs are padded with zeros to whole groups and panels.
size_t brlite_packed_bytes(int32_t format, int32_t num_outputs, int32_t num_inputs);
// Pack rows `first` .. `first + num_rows - 1` of a float32 matrix, rounded to bfloat16 first. Several threads may pack
// different rows.
void brlite_pack(int32_t format, const float* rows, int32_t first, int32_t num_rows, int32_t num_inputs, void* panels);
// Pack such rows of INT8_F16, INT4 or INT4_MIN: codes [num_rows][num_inputs], a byte each; scales and, for INT4_MIN,
// minimums [num_rows][num_inputs / 32] in half precision. `num_inputs` is whole groups.
void brlite_pack_codes(int32_t format, const uint8_t* codes, const uint16_t* scales, const uint16_t* minimums,
                       int32_t first, int32_t num_rows, int32_t num_inputs, void* panels);
// One packed row back as float32 [num_inputs].
void brlite_unpack_row(int32_t format, const void* panels, int32_t row, int32_t num_inputs, float* out);
// Bytes of a page: 16 tokens' keys and values of one key/value head.
size_t brlite_page_bytes(int32_t kv_format, int32_t head_dim);
// Copy and return a 64-bit checksum of what was copied; `to` may be null to only read.
uint64_t brlite_checksum(void* to, const void* from, size_t num_bytes);

// Bytes of a meeting in shared memory, at a multiple of 64; zeros are one that nobody has come to.
size_t brlite_meeting_bytes(void);
// A rank is gone: whoever waits for it, and whoever meets later, goes on at once, and runs end with an error.
void brlite_end_meeting(brlite_meeting* meeting);

// Threads that compute together, this one included, with scratch memory for a plan. Null if it cannot be had.
brlite_engine* brlite_create(const brlite_plan* plan, int32_t isa, int32_t num_threads);
void brlite_destroy(brlite_engine* engine);
// 0, or the number of what is wrong with the batch: nothing was computed then. 8: a meeting ended, and with it the
// sense of what was computed.
int32_t brlite_run(brlite_engine* engine, const brlite_batch* batch);
// What the last run took: seconds[0] from beginning to end, seconds[1] what all threads together computed in it. So
// seconds[1] / seconds[0] threads were at work, and the others waited or had no core.
void brlite_last_time(const brlite_engine* engine, double* seconds);
// The drawing alone, on this thread: from logits [num_rows][vocab_size], one draw for each row.
// 0, or -1 where there is no such instruction set or no memory.
int32_t brlite_draw_rows(int32_t isa, const brlite_draw* draws, brlite_drawn* drawn, int32_t num_rows,
                         int32_t vocab_size, const float* logits);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
