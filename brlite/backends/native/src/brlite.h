// The C interface of the native kernels: everything that Python (abi.py, by ctypes) and C++ exchange.
//
// The library contains operations, not models. A plan is a flat array of operations with pointers to their tensors; it
// is made once per model. `brlite_run` computes the plan for a batch of tokens, in which prompt chunks and decodes are
// mixed, and draws the next tokens.
//
// The result of a row depends on that row's sequence only. It has the same bits for any batch, chunk borders, number of
// threads and instruction set: integer sums are exact, float sums have one fixed order, and products of bfloat16
// numbers are exact.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define BRLITE_ABI_VERSION 16
#define BRLITE_KERNEL_VERSION 7  // raised by every change of the kernels that changes results

#define BRLITE_LANES 16        // outputs in a panel of a matrix, and tokens in a page of the cache
#define BRLITE_GROUP 32        // inputs that share one scale in a matrix of integers (Q6_K: 16)
#define BRLITE_BLOCK 256       // inputs in a block of Q4_K, Q6_K and IQ4_XS
#define BRLITE_CHUNK_PAGES 16  // pages in a chunk of attention: 256 tokens
#define BRLITE_MAX_HEAD_DIM 256
#define BRLITE_HEAD_ROWS 32  // rows of logits in memory at once

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

enum brlite_isa {
    BRLITE_GENERIC,
    BRLITE_AVX2,
    BRLITE_AVX_VNNI,  // with avx2
    BRLITE_AVX512,    // f, bw, vl, dq
    BRLITE_AVX512_VNNI,
    BRLITE_AVX512_BF16,  // with VNNI
    BRLITE_NEON,
    BRLITE_NEON_DOTPROD,
    BRLITE_NEON_I8MM,  // with dotprod
    BRLITE_NUM_ISAS,
};

// Number formats of weights. Activations are bfloat16 with BF16 weights. With all other formats they are int16 with one
// scale a row, or int8 with one scale for each group of a row (`has_int8_rows`). A plan uses one of the three. In the
// formats after BF16 a weight is
//   INT8_F16   scale * code, -128 .. 127        INT4_MIN    scale * code + minimum, 0 .. 15
//   INT4       scale * (code - 8), 0 .. 15      INT4_ZERO   scale * (code - zero point), both 0 .. 15
//   Q4_K       scale * code + minimum, 0 .. 15  Q6_K        scale * (code - 32), 0 .. 63
//   IQ4_NL, IQ4_XS, MXFP4   scale * table[code], 0 .. 15; the table's 16 numbers are bytes
// with one scale and one minimum or zero point a group: exactly the values that a quantized file stores. They are in
// IEEE half precision; those of Q4_K, Q6_K and IQ4_XS, GGML's formats of these names, are integers of a byte times a
// number in half precision, of which each block of inputs has one. Those of MXFP4 are powers of two. The two
// smallest that a file can have, 2^-127 and 2^-126, count as 0.
enum brlite_format {
    BRLITE_INT8,
    BRLITE_BF16,
    BRLITE_INT8_F16,
    BRLITE_INT4,
    BRLITE_INT4_MIN,
    BRLITE_INT4_ZERO,
    BRLITE_Q4_K,
    BRLITE_Q6_K,
    BRLITE_IQ4_NL,
    BRLITE_IQ4_XS,
    BRLITE_MXFP4,
    BRLITE_NUM_FORMATS,
};

enum brlite_kind {
    BRLITE_EMBED,   // weight: panels or table [vocabulary][num_outputs]  ->  output [rows][num_outputs]
    BRLITE_NORM,    // input [rows][num_inputs], weight [num_inputs]      ->  activations
    BRLITE_LINEAR,  // activations, weight: panels, bias or null          ->  output [rows][num_outputs]
    BRLITE_ADD,     // as LINEAR, but the product is added to `output`
    BRLITE_ROPE,    // input: q, k and v of each row; weight and bias: null, or the norms of a query and of a key head
                    //   ->  queries and keys rotated in their first num_inputs dimensions; keys and values in the cache
    BRLITE_ATTEND,  // queries and cache              ->  output [rows][num_heads * head_dim]
    BRLITE_QUANTIZE,  // input [rows][num_inputs]       ->  activations
    BRLITE_SILU,      // input [rows][2 * num_inputs]: gate, up  ->  activations silu(gate) * up
    BRLITE_GATE,      // as SILU                             ->  output [rows][num_inputs]
};

// One operation of a plan. Sizes are in elements. `row_size` is the stride of the rows of `input` or `output`.
// Rows of float buffers start at multiples of 16 elements. The padding between two rows is zero.
typedef struct brlite_operation {
    int32_t kind;
    int32_t format;  // of the matrix, or of the activations that the operation writes
    int32_t num_outputs;
    int32_t num_inputs;
    int32_t row_size;
    int32_t is_table;  // EMBED: `weight` is a bfloat16 table, not panels
    int32_t window;    // ATTEND: tokens to look back, 0 for all
    float epsilon;     // NORM, ROPE
    int32_t first;     // EMBED: `weight` has tokens `first` to `first + count - 1`; rows of other tokens stay
    int32_t count;
    int32_t output_row_size;  // GATE
    int32_t meets;            // barrier of all ranks after this one: the next operation reads what other ranks write
    int32_t is_part;          // LINEAR, ADD: the next operation computes more outputs of the same product
    int32_t has_int8_rows;    // NORM, QUANTIZE, SILU, LINEAR, ADD: the activations are int8
    const void* weight;
    const float* bias;
    const float* input;
    float* output;
    uint8_t* pages;   // ROPE, ATTEND: the layer's part of the cache
    double* squares;  // LINEAR, ADD with int16 activations: null, or [num_inputs], to which the squares of all rows of
                      // activations are added
} brlite_operation;

// What attention has in common in all layers. `cos` and `sin` are [max_positions][rotary_dim / 2].
typedef struct brlite_attention {
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;  // even
    int32_t rotary_dim;
    int32_t is_interleaved;  // rope rotates pairs (2i, 2i + 1), not (i, i + rotary_dim / 2)
    int32_t kv_format;
    int32_t pages_per_block;
    int32_t max_positions;
    float softmax_scale;
    int32_t reserved;
    const float* cos;
    const float* sin;
} brlite_attention;

// Consecutive tokens of one sequence, at positions start .. start + num_rows - 1, in consecutive rows.
typedef struct brlite_span {
    int32_t start;
    int32_t first_row;
    int32_t num_rows;
    int32_t reserved;
    const int32_t* block_table;
} brlite_span;

// How one token is drawn; with `target` >= 0, the token whose logprob is reported. See sample.h. An array may be null
// where its count is 0.
typedef struct brlite_draw {
#define FIELD(type, name) type name;
#define PARAMETER FIELD
#include "draw_fields.h"
#undef PARAMETER
#undef FIELD
} brlite_draw;

// The result of a draw. `top_ids` and `top_logprobs` have room for `num_logprobs`. `token` is -1 where the logits are
// not finite, and -2 where masks and bans leave no token.
typedef struct brlite_drawn {
    int32_t token;
    float logprob;
    int32_t* top_ids;
    float* top_logprobs;
} brlite_drawn;

// Ranks are processes on one machine that compute one plan together. A rank computes some of the heads and some of the
// outputs of every matrix. It writes its columns to memory that all ranks share; the next operation reads all columns.
// No sum is split among ranks, so a plan gives the same bits on any number of ranks.
// A meeting is the barrier at which the ranks wait for each other.
typedef struct brlite_meeting brlite_meeting;

// A plan. `body` runs for all rows. Then, for up to 32 rows with a draw at a time, `norm` (a NORM that reads `hidden`)
// and `head` (a LINEAR) compute logits [32][row_size], from which the tokens are drawn.
typedef struct brlite_plan {
    const brlite_operation* body;
    int32_t num_operations;
    int32_t max_rows;
    int32_t vocab_size;
    int32_t max_blocks;  // blocks of the cache, for checks only
    brlite_attention attention;
    brlite_operation norm;
    brlite_operation head;
    float* logits;            // [32][head.row_size]; head.output points into it
    brlite_meeting* meeting;  // null without ranks
    int32_t num_ranks;
    int32_t rank;  // rank 0 draws the tokens
} brlite_plan;

// Adds the hidden states of some rows, as `norm` gives them, to `total` [hidden]: row by row, in float64. So a prompt
// computed in chunks has the same bits as one computed at once.
typedef struct brlite_pooling {
    int32_t first_row;
    int32_t num_rows;
    double* total;
} brlite_pooling;

typedef struct brlite_batch {
    int32_t num_rows;
    int32_t num_spans;
    int32_t num_draws;
    int32_t num_threads;       // threads that compute this step; 0: all
    const int32_t* token_ids;  // [num_rows]
    const brlite_span* spans;
    const brlite_draw* draws;
    brlite_drawn* drawn;
    const brlite_pooling* poolings;
    int32_t num_poolings;
    int32_t reserved;
} brlite_batch;

typedef struct brlite_engine brlite_engine;

int32_t brlite_abi_version(void);
int32_t brlite_kernel_version(void);
size_t brlite_struct_size(int32_t which);   // in the order of abi.py's STRUCTS, which checks them
int32_t brlite_isa_available(int32_t isa);  // 1 if both this processor and this build have it
// The checksum of all results of a check of the self-test. 0: there is no such check or instruction set, or no memory.
uint64_t brlite_self_test(int32_t isa, int32_t check);

// Zeroed memory, in huge pages where the system has them. Null if the system gives no memory.
void* brlite_allocate(size_t num_bytes);
void brlite_release(void* memory, size_t num_bytes);

// Bytes of a packed matrix; inputs and outputs are padded with zeros to whole groups and panels.
size_t brlite_packed_bytes(int32_t format, int32_t num_outputs, int32_t num_inputs);
// Pack rows `first` .. `first + num_rows - 1` of a float32 matrix, rounded to bfloat16 first. Several threads may pack
// different rows.
void brlite_pack(int32_t format, const float* rows, int32_t first, int32_t num_rows, int32_t num_inputs, void* panels);
// The same for INT4_MIN, rounded to 4 bits: of each group the scale and the minimum are searched with which the squares
// of the errors have the least sum. `importance` [num_inputs] says how much those of each input count. Null: all alike,
// and the search is short.
void brlite_pack_int4(const float* rows, const float* importance, int32_t first, int32_t num_rows, int32_t num_inputs,
                      void* panels);
// Pack rows that are already quantized, for INT8_F16, INT4, INT4_MIN or INT4_ZERO: codes [num_rows][num_inputs], one
// byte each; scales and, where the format has them, minimums or zero points [num_rows][num_inputs / 32] in half
// precision. `num_inputs` is a multiple of 32.
void brlite_pack_codes(int32_t format, const uint8_t* codes, const uint16_t* scales, const uint16_t* offsets,
                       int32_t first, int32_t num_rows, int32_t num_inputs, void* panels);
// Pack rows of GGML's blocks: of 256 inputs of Q4_K (144 bytes), Q6_K (210) or IQ4_XS (136), or of 32 inputs of IQ4_NL
// (18) or MXFP4 (17).
void brlite_pack_blocks(int32_t format, const uint8_t* blocks, int32_t first, int32_t num_rows, int32_t num_inputs,
                        void* panels);
// Unpack one row to float32 [num_inputs].
void brlite_unpack_row(int32_t format, const void* panels, int32_t row, int32_t num_inputs, float* out);
// Bytes of a page: the keys and values of 16 tokens for one key/value head.
size_t brlite_page_bytes(int32_t kv_format, int32_t head_dim);
// Copies the bytes and returns their 64-bit checksum. With `to` null nothing is copied.
uint64_t brlite_checksum(void* to, const void* from, size_t num_bytes);

// Bytes of a meeting in shared memory, aligned to 64. All zeros is the initial state.
size_t brlite_meeting_bytes(void);
// To be called when a rank is lost. Every rank that waits, now or later, returns at once; its run ends with error 8.
void brlite_end_meeting(brlite_meeting* meeting);

// An engine for a plan: `num_threads` threads, the caller's included, and their scratch memory. Null if the system does
// not give them.
brlite_engine* brlite_create(const brlite_plan* plan, int32_t isa, int32_t num_threads);
void brlite_destroy(brlite_engine* engine);
// 0, or the number of an error (BatchError in engine.cpp). 1 to 7: nothing was computed. 8: a rank was lost, and the
// results must not be used.
int32_t brlite_run(brlite_engine* engine, const brlite_batch* batch);
// Time of the last run: seconds[0] is wall time, seconds[1] the processor time of all threads without waiting. So on
// average seconds[1] / seconds[0] threads were computing; the others waited or had no core.
void brlite_last_time(const brlite_engine* engine, double* seconds);
// Only draws, on the calling thread: one draw for each row of logits [num_rows][vocab_size].
// 0, or -1 where the instruction set is not available or memory is missing.
int32_t brlite_draw_rows(int32_t isa, const brlite_draw* draws, brlite_drawn* drawn, int32_t num_rows,
                         int32_t vocab_size, const float* logits);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
