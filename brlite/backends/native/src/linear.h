// LINEAR and ADD: a matrix times rows of activations. Threads divide the panels of the matrix among themselves. A panel
// stays in the L2 cache while all rows are multiplied by it, up to MAX_ROWS or MAX_GROUPED_ROWS rows (a tile) at a
// time.
//
//   int8 panel, one group of 32 inputs:   | 16 pairs x 16 columns: 512 bytes | 16 scales: 32 bytes |
//   int4 panel, one group of 32 inputs:   | 16 pairs x 16 columns: 256 bytes | 16 scales | 16 offsets, if it has them |
//   Q4_K panel, one block of 256 inputs:  | 16 halves for the scales | 16 for the minimums | 8 groups of int4 |
//   IQ4_NL panel, one group of 32 inputs: | as int4, with scales of 2 bytes; MXFP4: of 1 byte |
//   IQ4_XS panel, one block of 256 inputs: | 16 halves for the scales | 8 groups of int4, with scales of 1 byte |
//   Q6_K panel, one block of 256 inputs:  | 16 halves for the scales | 16 groups of 16 inputs: see step.h |
//   bf16 panel:                           | pairs of inputs, 64 bytes each |
#pragma once

#include "grouped.h"

namespace brlite {
namespace BRLITE_ISA {

// Prefetch distance in bytes where all rows fit one tile; found by measuring. For one row of integers AVX-512 leaves it
// to the processor's own prefetcher: software prefetches made it slower. With AVX2 a step on two Zen 3 cores is 1.1
// times as fast with a distance of 1 to 6 groups.
constexpr long FETCH_AHEAD = 16 * group_bytes(BRLITE_INT8), FETCH_AHEAD_OF_ONE_BF16_ROW = 2 * FETCH_AHEAD;
#if defined(BRLITE_HAS_AVX2)
constexpr long FETCH_AHEAD_OF_ONE_INTEGER_ROW = 2 * group_bytes(BRLITE_INT8);
#else
constexpr long FETCH_AHEAD_OF_ONE_INTEGER_ROW = 0;
#endif
constexpr long fetch_ahead(int format, int num_rows) {
    if (num_rows > 1) return FETCH_AHEAD;
    return format == BRLITE_BF16 ? FETCH_AHEAD_OF_ONE_BF16_ROW : FETCH_AHEAD_OF_ONE_INTEGER_ROW;
}

// Some rows times one panel. One panel at a time, so that a matrix is read as one stream in memory order: with two or
// four panels side by side, rows of 576 inputs reached half of the memory bandwidth.
struct Tile {
    const uint8_t* panel;
    const void* rows;
    const ActivationGroup* activations;  // of the first row
    long row_size;
    int block_rows;
    int num_inputs;
    float* out;  // [rows][16]
    int format;
    const uint8_t* table;  // of a format that has one: `table_of`
    long ahead;            // prefetch distance in bytes; 0: no prefetch
};

// Prefetches to L2, for one row of integers to L1. With more rows L1 made a step slower: that replaces data in use.
template <bool TO_L1>
INLINE void fetch(const uint8_t* from, int num_bytes) {
    UNROLLED for (int i = 0; i < num_bytes; i += 64) __builtin_prefetch(from + i, 0, TO_L1 ? 3 : 2);
}

// The scales of a group of a panel, and its minimums or zero points if it has them. Times the sum of the group's
// activations these are the offset of a product.
template <int FORMAT>
struct Scaling {
    Floats scales, offsets;

    INLINED Scaling(int format, const uint8_t* group, const Factors& factors) {
        scales = scales_of(format, group + code_bytes(FORMAT), factors);
        if constexpr (has_offsets(FORMAT)) offsets = offsets_of(FORMAT, group + code_bytes(FORMAT), factors);
    }

    // A sum of activations times codes, as one of activations times weights. Products are not fused with sums: the same
    // bits without FMA. `activations` is read for int4 only.
    INLINED Floats scaled(Floats sum, const ActivationGroup& activations) const {
        if constexpr (!is_int4(FORMAT)) return sum * scales;
        if constexpr (FORMAT == BRLITE_INT4) return (sum + splat(activations.minus_8_sums)) * scales;
        const Floats offset = offsets * splat(activations.sum);
        return has_minimums(FORMAT) ? sum * scales + offset : (sum - offset) * scales;
    }
};

// Activations are int16, or int8 with a scale for each group. Integer sums are exact in any order. The sum of a group
// of 4-bit codes is exact as a float, too, with and without the zero point's part; so is that of 16 6-bit codes.
template <int FORMAT, int ROWS, bool HAS_INT8_ROWS>
static void multiply_integers(const Tile& tile) {
    constexpr bool IS_BESIDE =
        pairs_of_line(FORMAT, ROWS) && !(HAS_INT8_ROWS && code_bits(FORMAT) < 8 && !has_table(FORMAT));
    // One kernel computes all formats with a table: its time does not depend on reading their scales.
    const int format = has_table(FORMAT) ? tile.format : FORMAT;
    const long bytes = group_bytes(format);
    const uint8_t* group = tile.panel;
    Factors factors;
    Floats totals[ROWS];
    UNROLLED for (int r = 0; r < ROWS; r++) totals[r] = splat(0.0f);
    for (int first = 0; first < tile.num_inputs; first += group_inputs(FORMAT), group += bytes) {
        if (has_blocks(format) && first % BRLITE_BLOCK == 0) {
            factors.read(format, group);
            group += block_head_bytes(format);
        }
        if (!IS_BESIDE && tile.ahead) fetch<ROWS == 1>(group + tile.ahead, group_bytes(FORMAT));
        const int index = first / BRLITE_GROUP, half = first % BRLITE_GROUP / group_inputs(FORMAT);
        const long first_group = HAS_INT8_ROWS ? (long)index * tile.block_rows : index;
        const GroupOfRows activations = {tile.activations + first_group,
                                         HAS_INT8_ROWS ? 1 : tile.row_size / BRLITE_GROUP};
        Floats sums[ROWS];
        if constexpr (HAS_INT8_ROWS)
            sum_group<FORMAT>(sums, group, (const GroupedRow*)tile.rows + first_group * BRLITE_GROUP, BRLITE_GROUP,
                              activations, half, tile.table);
        else
            sum_integers<FORMAT>(sums, group, (const Int8::Row*)tile.rows + first, tile.row_size, activations, half,
                                 tile.table);
        const Scaling<FORMAT> scaling(format, group, factors);
        UNROLLED for (int r = 0; r < ROWS; r++) {
            const Floats sum = scaling.scaled(sums[r], activations[r]);
            totals[r] = totals[r] + (HAS_INT8_ROWS ? sum * splat(activations[r].scale) : sum);
        }
    }
    UNROLLED for (int r = 0; r < ROWS; r++) store(tile.out + r * LANES, totals[r]);
}

template <int ROWS>
INLINE void multiply_bf16(const Tile& tile) {
    constexpr int BLOCK_BYTES = BRLITE_GROUP / 2 * Bf16::PAIR_BYTES;
    const Bf16::Row* rows = (const Bf16::Row*)tile.rows;
    const uint8_t* panel[1] = {tile.panel};
    Bf16::Sum sums[1][ROWS][1];
    clear<Bf16>(sums[0]);
    for (int first = 0; first < tile.num_inputs; first += BRLITE_GROUP, panel[0] += BLOCK_BYTES) {
        if (tile.ahead) fetch<false>(panel[0] + tile.ahead, BLOCK_BYTES);
        add_pairs<Bf16>(sums, panel, Bf16::PAIR_BYTES, rows + first, tile.row_size, BRLITE_GROUP / 2);
    }
    store_sums<Bf16>(sums[0], tile.out, LANES);
}

template <int FORMAT, int ROWS>
static void multiply(const Tile& tile) {
    if constexpr (FORMAT == BRLITE_BF16)
        multiply_bf16<ROWS>(tile);
    else
        multiply_integers<FORMAT, ROWS, false>(tile);
}

typedef void (*TileKernel)(const Tile&);

// By format and rows - 1.
#define TILES(f) {multiply<f, 1>, multiply<f, 2>, multiply<f, 3>, multiply<f, 4>, multiply<f, 5>, multiply<f, 6>}
static const TileKernel TILE_KERNELS[BRLITE_NUM_FORMATS][6] = {
    TILES(BRLITE_INT8),     TILES(BRLITE_BF16),      TILES(BRLITE_INT8_F16), TILES(BRLITE_INT4),
    TILES(BRLITE_INT4_MIN), TILES(BRLITE_INT4_ZERO), TILES(BRLITE_Q4_K),     TILES(BRLITE_Q6_K),
    TILES(BRLITE_IQ4_NL),   TILES(BRLITE_IQ4_NL),    TILES(BRLITE_IQ4_NL)};
#undef TILES
#define TILE(f, rows) multiply_integers<f, (rows < MAX_GROUPED_ROWS ? rows : MAX_GROUPED_ROWS), true>
#define TILES(f)                                                               \
    {TILE(f, 1), TILE(f, 2), TILE(f, 3), TILE(f, 4),  TILE(f, 5),  TILE(f, 6), \
     TILE(f, 7), TILE(f, 8), TILE(f, 9), TILE(f, 10), TILE(f, 11), TILE(f, 12)}
static const TileKernel GROUPED_KERNELS[BRLITE_NUM_FORMATS][12] = {TILES(BRLITE_INT8),     {},
                                                                   TILES(BRLITE_INT8_F16), TILES(BRLITE_INT4),
                                                                   TILES(BRLITE_INT4_MIN), TILES(BRLITE_INT4_ZERO),
                                                                   TILES(BRLITE_Q4_K),     TILES(BRLITE_Q6_K),
                                                                   TILES(BRLITE_IQ4_NL),   TILES(BRLITE_IQ4_NL),
                                                                   TILES(BRLITE_IQ4_NL)};
#undef TILES
#undef TILE

struct Product {
    const brlite_operation& op;
    const Activations& input;
    float* output;
    int first_row, end_row;
};

// Applies activation scale, bias and residual to a tile of sums, and writes it to the output.
INLINE void finish_tile(const Product& product, const float* sums, int first_row, int num_rows, int panel) {
    const brlite_operation& op = product.op;
    for (int r = 0; r < num_rows; r++, sums += LANES) {
        float* out = product.output + (long)(first_row + r) * op.row_size + panel * LANES;
        const bool has_scale = takes_int16(op.format) && !op.has_int8_rows;
        Floats value = load(sums) * splat(has_scale ? product.input.scales[first_row + r] : 1.0f);
        if (op.bias) value = value + load(op.bias + panel * LANES);
        if (op.kind == BRLITE_ADD) value = load(out) + value;
        store(out, value);
    }
}

INLINE long element_bytes(const brlite_operation& op) {
    return op.has_int8_rows ? sizeof(GroupedRow) : takes_int16(op.format) ? sizeof(Int8::Row) : sizeof(Bf16::Row);
}

// The rows of a block of int8 activations: blocks of equal size, 13 rows are 7 + 6.
INLINE int rows_of_block(int num_rows) {
    const int num_blocks = larger(1, (num_rows + MAX_GROUPED_ROWS - 1) / MAX_GROUPED_ROWS);
    return larger(1, (num_rows + num_blocks - 1) / num_blocks);
}

INLINE void multiply_panel(const Product& product, int panel) {
    const brlite_operation& op = product.op;
    const Activations& input = product.input;
    const long bytes = panel_bytes(op.format, op.num_inputs);
    const int begin = product.first_row, end = product.end_row, num_rows = end - begin;
    const int num_tiles = (num_rows + MAX_ROWS - 1) / MAX_ROWS;
    float sums[larger(MAX_ROWS, MAX_GROUPED_ROWS) * LANES] __attribute__((aligned(64)));
    for (int first = begin, last, tile_index = 1; first < end; first = last, tile_index++) {
        // Tiles of equal size: 8 rows are 4 + 4, not 6 + 2. With int8 activations a tile is in one block.
        last = op.has_int8_rows ? smaller(end, (first / input.block_rows + 1) * input.block_rows)
                                : begin + (int)((long)num_rows * tile_index / num_tiles);
        const long first_group = op.has_int8_rows ? input.first_group(first) : first * input.row_size / BRLITE_GROUP;
        const long row_at = op.has_int8_rows ? first_group * BRLITE_GROUP : first * input.row_size;
        // Only the first tile reads weights from memory. If more tiles follow, it prefetches the next panel.
        const long ahead = first > begin ? 0 : last < end ? bytes : fetch_ahead(op.format, num_rows);
        const Tile tile = {(const uint8_t*)op.weight + panel * bytes,
                           (const uint8_t*)input.rows + row_at * element_bytes(op),
                           input.groups + first_group,
                           input.row_size,
                           input.block_rows,
                           padded_inputs(op.num_inputs),
                           sums,
                           op.format,
                           table_of(op.format),
                           ahead};
        // Prefetch the output: its rows are far apart, each in another memory page.
        const float* out = product.output + (long)first * op.row_size + panel * LANES;
        for (int r = 0; r < last - first; r++) __builtin_prefetch(out + r * (long)op.row_size, 1);
        (op.has_int8_rows ? GROUPED_KERNELS[op.format] : TILE_KERNELS[op.format])[last - first - 1](tile);
        finish_tile(product, sums, first, last - first, panel);
    }
}

// The panels that this thread takes: those of its own part of the matrix, then what other threads have left of theirs.
// They are consecutive, and the next one is seldom another thread's. So prefetches are not lost: on two Zen 3 cores a
// step of up to 16 rows is 1.02 to 1.06 times as fast as with parts that follow each other in the order of taking.
static void linear(const Product& product, Counter* parts, int thread, int num_threads) {
    const int num_panels = rounded_up(product.op.num_outputs, LANES) / LANES;
    for (int i = 0; i < num_threads; i++) {
        const int part = (thread + i) % num_threads;
        const int begin = (int)((long)num_panels * part / num_threads);
        const int size = (int)((long)num_panels * (part + 1) / num_threads) - begin;
        for (int panel, end; parts[part].take_share(size, panel, end);)
            for (; panel < end; panel++) multiply_panel(product, begin + panel);
    }
}

// All panels times the rows [first, end).
static void linear_of_rows(const brlite_operation& op, const Activations& input, int first, int end) {
    const Product product = {op, input, op.output, first, end};
    for (int panel = 0; panel < rounded_up(op.num_outputs, LANES) / LANES; panel++) multiply_panel(product, panel);
}

}  // namespace BRLITE_ISA
}  // namespace brlite
