// LINEAR and ADD: a matrix times rows of activations. Threads divide the panels of the matrix among themselves. A panel
// stays in the L2 cache while all rows are multiplied by it, up to MAX_ROWS rows (a tile) at a time.
//
//   int8 panel, one group of 32 inputs:   | 16 pairs x 16 columns: 512 bytes | 16 scales: 32 bytes |
//   int4 panel, one group of 32 inputs:   | 16 pairs x 16 columns: 256 bytes | 16 scales | 16 offsets, if it has them |
//   bf16 panel:                           | pairs of inputs, 64 bytes each |
#pragma once

#include "multiply.h"

namespace brlite {
namespace BRLITE_ISA {

// Prefetch distance in bytes where all rows fit one tile; found by measuring. For one row of integers the processor's
// own prefetcher is fast enough, and software prefetches made it slower.
constexpr long FETCH_AHEAD = 16 * group_bytes(BRLITE_INT8), FETCH_AHEAD_OF_ONE_BF16_ROW = 2 * FETCH_AHEAD;
constexpr long fetch_ahead(int format, int num_rows) {
    return num_rows > 1 ? FETCH_AHEAD : format == BRLITE_BF16 ? FETCH_AHEAD_OF_ONE_BF16_ROW : 0;
}

// Independent sums per row, used in turn: a multiply-add takes several cycles, and the next need not wait for its sum.
#if defined(BRLITE_HAS_AVX512)
constexpr int sums_of_row(int, int num_rows) { return num_rows <= 2 ? 4 : 2; }
#elif defined(BRLITE_HAS_AVX2)
constexpr int sums_of_row(int format, int num_rows) { return is_int4(format) && num_rows == 1 ? 3 : 1; }
#else
constexpr int sums_of_row(int, int) { return 1; }
#endif

// Some rows times one panel. One panel at a time, so that a matrix is read as one stream in memory order: with two or
// four panels side by side, rows of 576 inputs reached half of the memory bandwidth.
struct Tile {
    const uint8_t* panel;
    const void* rows;
    const float* group_sums;
    long row_size;
    int num_inputs;
    float* out;  // [rows][16]
    long ahead;  // prefetch distance in bytes; 0: no prefetch
};

// Prefetches to L2. Prefetching to L1 made a step slower: it replaces data that is in use.
INLINE void fetch(const uint8_t* from, int num_bytes) {
    UNROLLED for (int i = 0; i < num_bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Integer sums are exact in any order. The sum of a group of 4-bit codes is exact as a float, too, with and without the
// zero point's part.
template <int FORMAT, int ROWS>
INLINE void multiply_integers(const Tile& tile) {
    constexpr int SUMS = sums_of_row(FORMAT, ROWS);
    const int16_t* rows = (const int16_t*)tile.rows;
    const uint8_t* panel[1] = {tile.panel};
    Floats totals[ROWS];
    UNROLLED for (int r = 0; r < ROWS; r++) totals[r] = splat(0.0f);
    const float* group_sums = tile.group_sums;
    for (int first = 0; first < tile.num_inputs; first += BRLITE_GROUP, group_sums++) {
        Int8::Sum sums[SUMS][ROWS][1];
        UNROLLED for (int i = 0; i < SUMS; i++) clear<Int8>(sums[i]);
        if (tile.ahead) fetch(panel[0] + tile.ahead, group_bytes(FORMAT));
        if constexpr (is_int4(FORMAT))
            add_int4_pairs(sums, panel[0], rows + first, tile.row_size);
        else
            add_pairs<Int8>(sums, panel, Int8::PAIR_BYTES, rows + first, tile.row_size, BRLITE_GROUP / 2);
        const uint16_t* halves = (const uint16_t*)(panel[0] + code_bytes(FORMAT));
        const Floats scales = FORMAT == BRLITE_INT8 ? from_halves(halves) : from_fp16(halves);
        // Minimums or zero points; times the sum of the group's activations they are the offset of the product.
        const Floats offsets = has_offsets(FORMAT) ? from_fp16(halves + LANES) : splat(8.0f);
        UNROLLED for (int r = 0; r < ROWS; r++) {
            UNROLLED for (int i = 1; i < SUMS; i++) sums[0][r][0] = Int8::plus(sums[0][r][0], sums[i][r][0]);
            const Floats sum = Int8::floats(sums[0][r][0]);
            Floats product = sum * scales;  // not fused: the same bits without FMA
            if constexpr (is_int4(FORMAT)) {
                const Floats offset = offsets * splat(group_sums[r * tile.row_size / BRLITE_GROUP]);
                product = FORMAT == BRLITE_INT4_MIN ? product + offset : (sum - offset) * scales;
            }
            totals[r] = totals[r] + product;
        }
        panel[0] += group_bytes(FORMAT);
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
        if (tile.ahead) fetch(panel[0] + tile.ahead, BLOCK_BYTES);
        add_pairs<Bf16>(sums, panel, Bf16::PAIR_BYTES, rows + first, tile.row_size, BRLITE_GROUP / 2);
    }
    store_sums<Bf16>(sums[0], tile.out, LANES);
}

template <int FORMAT, int ROWS>
static void multiply(const Tile& tile) {
    if constexpr (FORMAT == BRLITE_BF16)
        multiply_bf16<ROWS>(tile);
    else
        multiply_integers<FORMAT, ROWS>(tile);
}

typedef void (*TileKernel)(const Tile&);

#define TILES(f) {multiply<f, 1>, multiply<f, 2>, multiply<f, 3>, multiply<f, 4>, multiply<f, 5>, multiply<f, 6>}
// By format and rows - 1.
static const TileKernel TILE_KERNELS[BRLITE_NUM_FORMATS][6] = {TILES(BRLITE_INT8),     TILES(BRLITE_BF16),
                                                               TILES(BRLITE_INT8_F16), TILES(BRLITE_INT4),
                                                               TILES(BRLITE_INT4_MIN), TILES(BRLITE_INT4_ZERO)};
#undef TILES

struct Product {
    const brlite_operation& op;
    const Activations& input;
    float* output;
    int num_rows;
};

// Applies activation scale, bias and residual to a tile of sums, and writes it to the output.
INLINE void finish_tile(const Product& product, const float* sums, int first_row, int num_rows, int panel) {
    const brlite_operation& op = product.op;
    for (int r = 0; r < num_rows; r++, sums += LANES) {
        float* out = product.output + (long)(first_row + r) * op.row_size + panel * LANES;
        Floats value = load(sums) * splat(takes_int16(op.format) ? product.input.scales[first_row + r] : 1.0f);
        if (op.bias) value = value + load(op.bias + panel * LANES);
        if (op.kind == BRLITE_ADD) value = load(out) + value;
        store(out, value);
    }
}

INLINE void multiply_panel(const Product& product, int panel) {
    const brlite_operation& op = product.op;
    const long element = takes_int16(op.format) ? sizeof(Int8::Row) : sizeof(Bf16::Row);
    const long bytes = panel_bytes(op.format, op.num_inputs);
    float sums[MAX_ROWS * LANES] __attribute__((aligned(64)));
    const int num_tiles = (product.num_rows + MAX_ROWS - 1) / MAX_ROWS;
    // Only the first tile reads weights from memory. If more tiles follow, it prefetches the next panel.
    long ahead = num_tiles > 1 ? bytes : fetch_ahead(op.format, product.num_rows);
    for (int t = 0; t < num_tiles; t++, ahead = 0) {  // tiles of equal size: 8 rows are 4 + 4, not 6 + 2
        const int first = (int)((long)product.num_rows * t / num_tiles);
        const int rows = (int)((long)product.num_rows * (t + 1) / num_tiles) - first;
        const uint8_t* from = (const uint8_t*)product.input.rows + first * product.input.row_size * element;
        const Tile tile = {(const uint8_t*)op.weight + panel * bytes,
                           from,
                           product.input.group_sums + first * product.input.row_size / BRLITE_GROUP,
                           product.input.row_size,
                           padded_inputs(op.num_inputs),
                           sums,
                           ahead};
        // Prefetch the output: its rows are far apart, each in another memory page.
        const float* out = product.output + (long)first * op.row_size + panel * LANES;
        for (int r = 0; r < rows; r++) __builtin_prefetch(out + r * (long)op.row_size, 1);
        TILE_KERNELS[op.format][rows - 1](tile);
        finish_tile(product, sums, first, rows, panel);
    }
}

// The panels that this thread takes. They are consecutive, so that the processor's prefetcher can follow.
static void linear(const Product& product, Counter& next, int num_threads) {
    const int num_panels = rounded_up(product.op.num_outputs, LANES) / LANES;
    for (int panel, end; next.take_share(num_panels, num_threads, panel, end);)
        for (; panel < end; panel++) multiply_panel(product, panel);
}

}  // namespace BRLITE_ISA
}  // namespace brlite
