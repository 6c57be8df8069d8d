// A matrix times rows: LINEAR and ADD. Threads share the panels of a matrix; a block of panels stays in the processor's
// second cache while all rows pass by, a few at a time.
//
//   int8 panel, one group of 32 inputs:   | 16 pairs x 16 columns: 512 bytes | 16 scales, bfloat16: 32 bytes |
//   bf16 panel:                           | pairs of inputs, 64 bytes each |
#pragma once

#include "multiply.h"

namespace brlite {
namespace BRLITE_ISA {

constexpr int GROUP_BYTES = BRLITE_GROUP * LANES + 2 * LANES;
constexpr int MAX_PANELS_AT_ONCE = 4;

struct Tile {
    const uint8_t* panels;
    long panel_bytes;
    const void* rows;
    long row_size;
    int num_inputs;
    float* out;  // [rows][panels * 16]
    long ahead;  // how far ahead weights are fetched; 0: not at all
};

// How far ahead weights are fetched where one tile is all; found by trying: a single row passes through them fastest.
constexpr long FETCH_AHEAD_OF_ONE_ROW = 2 * GROUP_BYTES, FETCH_AHEAD = 8 * GROUP_BYTES;

// Into the second cache: the first is full of what is used now, and fetching there made a step slower.
INLINE void fetch(const uint8_t* from, int num_bytes) {
    UNROLLED for (int i = 0; i < num_bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

template <int ROWS, int PANELS>
static void multiply_int8(const Tile& tile) {
    const int16_t* rows = (const int16_t*)tile.rows;
    const uint8_t* at[PANELS];
    Floats totals[ROWS][PANELS];
    UNROLLED for (int p = 0; p < PANELS; p++) at[p] = tile.panels + p * tile.panel_bytes;
    UNROLLED for (int r = 0; r < ROWS; r++) UNROLLED for (int p = 0; p < PANELS; p++) totals[r][p] = splat(0.0f);
    for (int first = 0; first < tile.num_inputs; first += BRLITE_GROUP) {
        Int8::Sum sums[ROWS][PANELS];
        clear<Int8>(sums);
        if (tile.ahead) {
            UNROLLED for (int p = 0; p < PANELS; p++) fetch(at[p] + tile.ahead, GROUP_BYTES);
        }
        add_pairs<Int8>(sums, at, Int8::PAIR_BYTES, rows + first, tile.row_size, BRLITE_GROUP / 2);
        UNROLLED for (int p = 0; p < PANELS; p++) {
            const Floats scales = from_halves((const uint16_t*)(at[p] + BRLITE_GROUP * LANES));
            UNROLLED for (int r = 0; r < ROWS; r++)  // not fused: processors without FMA get the same bits
                totals[r][p] = totals[r][p] + Int8::floats(sums[r][p]) * scales;
            at[p] += GROUP_BYTES;
        }
    }
    UNROLLED for (int r = 0; r < ROWS; r++) UNROLLED for (int p = 0; p < PANELS; p++)
        store(tile.out + (r * PANELS + p) * LANES, totals[r][p]);
}

template <int ROWS, int PANELS>
static void multiply_bf16(const Tile& tile) {
    constexpr int BLOCK_BYTES = BRLITE_GROUP / 2 * Bf16::PAIR_BYTES;
    const Bf16::Row* rows = (const Bf16::Row*)tile.rows;
    const uint8_t* at[PANELS];
    Bf16::Sum sums[ROWS][PANELS];
    UNROLLED for (int p = 0; p < PANELS; p++) at[p] = tile.panels + p * tile.panel_bytes;
    clear<Bf16>(sums);
    for (int first = 0; first < tile.num_inputs; first += BRLITE_GROUP) {
        if (tile.ahead) {
            UNROLLED for (int p = 0; p < PANELS; p++) fetch(at[p] + tile.ahead, BLOCK_BYTES);
        }
        add_pairs<Bf16>(sums, at, Bf16::PAIR_BYTES, rows + first, tile.row_size, BRLITE_GROUP / 2);
        UNROLLED for (int p = 0; p < PANELS; p++) at[p] += BLOCK_BYTES;
    }
    store_sums<Bf16>(sums, tile.out, PANELS * LANES);
}

typedef void (*TileKernel)(const Tile&);

#define TILE_ROW(name, rows) {name<rows, 1>, name<rows, 2>, nullptr, name<rows, 4>}
#define TILE_ROW_2(name, rows) {name<rows, 1>, name<rows, 2>, nullptr, nullptr}

// By format, rows - 1 and panels - 1.
static const TileKernel TILE_KERNELS[2][6][4] = {
    {TILE_ROW(multiply_int8, 1), TILE_ROW(multiply_int8, 2), TILE_ROW(multiply_int8, 3), TILE_ROW_2(multiply_int8, 4),
     TILE_ROW_2(multiply_int8, 5), TILE_ROW_2(multiply_int8, 6)},
    {TILE_ROW(multiply_bf16, 1), TILE_ROW(multiply_bf16, 2), TILE_ROW(multiply_bf16, 3), TILE_ROW_2(multiply_bf16, 4),
     TILE_ROW_2(multiply_bf16, 5), TILE_ROW_2(multiply_bf16, 6)},
};

struct Product {
    const brlite_operation& op;
    const Activations& input;
    float* output;
    int num_rows;
};

// Scale, bias and residual: what happens to a tile of plain sums on its way out.
INLINE void finish_tile(const Product& product, const float* sums, int first_row, int num_rows, int first_panel,
                        int num_panels) {
    const brlite_operation& op = product.op;
    for (int r = 0; r < num_rows; r++) {
        float* out = product.output + (long)(first_row + r) * op.row_size + first_panel * LANES;
        Floats scale = splat(op.format == BRLITE_INT8 ? product.input.scales[first_row + r] : 1.0f);
        for (int p = 0; p < num_panels; p++, sums += LANES, out += LANES) {
            Floats value = load(sums) * scale;
            if (op.bias) value = value + load(op.bias + (first_panel + p) * LANES);
            if (op.kind == BRLITE_ADD) value = load(out) + value;
            store(out, value);
        }
    }
}

// Where a tile will be written, fetched while it is computed: rows lie far apart, and each is another page.
INLINE void fetch_output(const Product& product, int first_row, int num_rows, int first_panel, int num_panels) {
    const float* out = product.output + (long)first_row * product.op.row_size + first_panel * LANES;
    for (int r = 0; r < num_rows; r++, out += product.op.row_size)
        for (int p = 0; p < num_panels; p++) __builtin_prefetch(out + p * LANES, 1);
}

INLINE void multiply_panels(const Product& product, int first_panel, int num_panels) {
    const brlite_operation& op = product.op;
    const long element = op.format == BRLITE_INT8 ? sizeof(Int8::Row) : sizeof(Bf16::Row);
    const long bytes = panel_bytes(op.format, op.num_inputs);
    float sums[MAX_ROWS * MAX_PANELS_AT_ONCE * LANES] __attribute__((aligned(64)));
    const int num_tiles = (product.num_rows + MAX_ROWS - 1) / MAX_ROWS;
    // The first tile reads weights from memory. With more tiles to come it fetches the next panels meanwhile.
    long ahead = num_tiles > 1 ? num_panels * bytes : product.num_rows == 1 ? FETCH_AHEAD_OF_ONE_ROW : FETCH_AHEAD;
    for (int t = 0; t < num_tiles; t++, ahead = 0) {  // tiles as even as they can be: 8 rows are 4 + 4, not 6 + 2
        const int first = (int)((long)product.num_rows * t / num_tiles);
        const int rows = (int)((long)product.num_rows * (t + 1) / num_tiles) - first;
        const uint8_t* from = (const uint8_t*)product.input.rows + first * product.input.row_size * element;
        const Tile tile = {(const uint8_t*)op.weight + first_panel * bytes,
                           bytes,
                           from,
                           product.input.row_size,
                           padded_inputs(op.num_inputs),
                           sums,
                           ahead};
        fetch_output(product, first, rows, first_panel, num_panels);
        TILE_KERNELS[op.format][rows - 1][num_panels - 1](tile);
        finish_tile(product, sums, first, rows, first_panel, num_panels);
    }
}

// This thread's share: blocks of panels, taken by whoever is free.
static void linear(const Product& product, Counter& next, int num_threads) {
    const int num_panels = rounded_up(product.op.num_outputs, LANES) / LANES;
    const int tiles = (product.num_rows + MAX_ROWS - 1) / MAX_ROWS;
    const int at_once = panels_at_once((product.num_rows + tiles - 1) / tiles);
    const int block = larger(at_once, rounded_up(num_panels / (num_threads * 8), at_once));
    for (int first = next.take(block); first < num_panels; first = next.take(block)) {
        const int end = smaller(first + block, num_panels);
        int panel = first;
        for (; panel + at_once <= end; panel += at_once) multiply_panels(product, panel, at_once);
        for (; panel < end; panel++) multiply_panels(product, panel, 1);
    }
}

}  // namespace BRLITE_ISA
}  // namespace brlite
