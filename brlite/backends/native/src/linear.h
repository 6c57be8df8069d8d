// LINEAR and ADD: a matrix times rows of activations. Threads divide the panels of the matrix among themselves. A panel
// stays in the L2 cache while all rows are multiplied by it, up to MAX_ROWS rows (a tile) at a time.
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

// Prefetch distance in bytes where all rows fit one tile; found by measuring. One row of integers prefetches between
// its products (multiply.h). Where it does not, AVX-512 leaves it to the processor's own prefetcher: a group at a time
// made it slower on Zen 4. With AVX2 a step on two Zen 3 cores is 1.1 times as fast with a distance of 1 to 6 groups.
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

// Some rows times one panel or two. Few rows take one panel at a time, so that a matrix is read as one stream in memory
// order: with two or four panels side by side, rows of 576 inputs reached half of the memory bandwidth.
struct Tile {
    const uint8_t* panel;
    long panel_bytes;  // to the next panel
    const void* rows;
    const ActivationGroup* activations;  // of the first row
    long row_size;
    int block_rows;
    int num_inputs;
    float* out;  // [panels][rows][16]
    int format;
    const uint8_t* table;  // of a format that has one: `table_of`
    // Of the groups of inputs, this tile prefetches the one of each `num_tiles` that has its index.
    int index, num_tiles;
    long ahead;  // prefetch distance in bytes
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

    // Adds the activations times the weights of a group to `total`, from the sum of activations times codes.
    // `activations` is read for int8 activations and for formats with offsets.
    template <bool HAS_INT8_ROWS>
    INLINED Floats added(Floats total, Floats sum, const ActivationGroup& activations) const {
        if constexpr (has_offsets(FORMAT) && !has_minimums(FORMAT)) sum = fused(-offsets, splat(activations.sum), sum);
        if constexpr (HAS_INT8_ROWS)
            total = fused(sum * scales, splat(activations.scale), total);
        else
            total = fused(sum, scales, total);
        if constexpr (has_minimums(FORMAT)) total = fused(offsets, splat(activations.scaled_sum), total);
        return total;
    }
};

// Activations are int16, or int8 with a scale for each group. Integer sums are exact in any order. The sum of a group
// of 4-bit codes is exact as a float, too, with and without the zero point's part; so is that of 16 6-bit codes.
template <int FORMAT, int ROWS, int PANELS, bool HAS_INT8_ROWS>
static void multiply_integers(const Tile& tile) {
    constexpr bool IS_BESIDE =
        pairs_of_line(FORMAT, ROWS) && !(HAS_INT8_ROWS && code_bits(FORMAT) < 8 && !has_table(FORMAT));
    // One kernel computes all formats with a table: its time does not depend on reading their scales.
    const int format = has_table(FORMAT) ? tile.format : FORMAT;
    const long bytes = group_bytes(format);
    const uint8_t* groups[PANELS];
    Factors factors[PANELS];
    Floats totals[ROWS][PANELS];
    UNROLLED for (int p = 0; p < PANELS; p++) {
        groups[p] = tile.panel + p * tile.panel_bytes;
        UNROLLED for (int r = 0; r < ROWS; r++) totals[r][p] = splat(0.0f);
    }
    int until_fetch = tile.index;
    for (int first = 0; first < tile.num_inputs; first += group_inputs(FORMAT)) {
        UNROLLED for (int p = 0; p < PANELS; p++) {
            if (has_blocks(format) && first % BRLITE_BLOCK == 0) {
                factors[p].read(format, groups[p]);
                groups[p] += block_head_bytes(format);
            }
            if (!IS_BESIDE && tile.ahead && until_fetch == 0)
                fetch<ROWS == 1>(groups[p] + tile.ahead, group_bytes(FORMAT));
        }
        until_fetch = (until_fetch ? until_fetch : tile.num_tiles) - 1;
        const int index = first / BRLITE_GROUP, half = first % BRLITE_GROUP / group_inputs(FORMAT);
        const long first_group = HAS_INT8_ROWS ? (long)index * tile.block_rows : index;
        const GroupOfRows activations = {tile.activations + first_group,
                                         HAS_INT8_ROWS ? 1 : tile.row_size / BRLITE_GROUP};
        Floats sums[ROWS][PANELS];
        if constexpr (HAS_INT8_ROWS)
            sum_group<FORMAT>(sums, groups, (const GroupedRow*)tile.rows + first_group * BRLITE_GROUP, BRLITE_GROUP,
                              activations, half, tile.table);
        else
            sum_integers<FORMAT>(sums, groups, (const Int8::Row*)tile.rows + first, tile.row_size, activations, half,
                                 tile.table);
        UNROLLED for (int p = 0; p < PANELS; p++) {
            const Scaling<FORMAT> scaling(format, groups[p], factors[p]);
            UNROLLED for (int r = 0; r < ROWS; r++) totals[r][p] =
                scaling.template added<HAS_INT8_ROWS>(totals[r][p], sums[r][p], activations[r]);
            groups[p] += bytes;
        }
    }
    UNROLLED for (int p = 0; p < PANELS; p++) UNROLLED for (int r = 0; r < ROWS; r++)
        store(tile.out + (p * ROWS + r) * LANES, totals[r][p]);
}

template <int ROWS, int PANELS>
INLINE void multiply_bf16(const Tile& tile) {
    constexpr int BLOCK_BYTES = BRLITE_GROUP / 2 * Bf16::PAIR_BYTES;
    const Bf16::Row* rows = (const Bf16::Row*)tile.rows;
    const uint8_t* panels[PANELS];
    UNROLLED for (int p = 0; p < PANELS; p++) panels[p] = tile.panel + p * tile.panel_bytes;
    Bf16::Sum sums[1][ROWS][PANELS];
    clear<Bf16>(sums[0]);
    int until_fetch = tile.index;
    for (int first = 0; first < tile.num_inputs; first += BRLITE_GROUP) {
        if (tile.ahead && until_fetch == 0)
            UNROLLED for (int p = 0; p < PANELS; p++) fetch<false>(panels[p] + tile.ahead, BLOCK_BYTES);
        add_pairs<Bf16>(sums, panels, Bf16::PAIR_BYTES, rows + first, tile.row_size, BRLITE_GROUP / 2);
        UNROLLED for (int p = 0; p < PANELS; p++) panels[p] += BLOCK_BYTES;
        until_fetch = (until_fetch ? until_fetch : tile.num_tiles) - 1;
    }
    UNROLLED for (int p = 0; p < PANELS; p++) UNROLLED for (int r = 0; r < ROWS; r++)
        store(tile.out + (p * ROWS + r) * LANES, Bf16::floats(sums[0][r][p]));
}

template <int FORMAT, int ROWS, int PANELS, bool HAS_INT8_ROWS>
static void multiply(const Tile& tile) {
    if constexpr (FORMAT == BRLITE_BF16)
        multiply_bf16<ROWS, PANELS>(tile);
    else
        multiply_integers<FORMAT, ROWS, PANELS, HAS_INT8_ROWS>(tile);
}

typedef void (*TileKernel)(const Tile&);

constexpr int panels_of_tile(int num_rows) { return num_rows <= MAX_ROWS_OF_ONE_PANEL ? 1 : 2; }

// The kernel of a tile; of the largest there is for tiles that are never asked for.
template <int FORMAT, int ROWS, int PANELS, bool HAS_INT8_ROWS>
constexpr TileKernel tile_kernel() {
    constexpr int rows = smaller(ROWS, PANELS == 1 ? MAX_ROWS_OF_ONE_PANEL : MAX_ROWS);
    return multiply<FORMAT, rows, smaller(PANELS, panels_of_tile(rows)), HAS_INT8_ROWS>;
}

// By format, panels - 1, and rows - 1.
#define TILE(f, rows, panels) tile_kernel<f, rows, panels, HAS_INT8_ROWS>()
#define TILES(f, panels)                                         \
    {TILE(f, 1, panels), TILE(f, 2, panels), TILE(f, 3, panels), \
     TILE(f, 4, panels), TILE(f, 5, panels), TILE(f, 6, panels)}
#define FORMAT_TILES(f) {TILES(f, 1), TILES(f, 2)}
template <bool HAS_INT8_ROWS>
static constexpr TileKernel TILE_KERNELS[BRLITE_NUM_FORMATS][2][6] = {
    FORMAT_TILES(BRLITE_INT8),   FORMAT_TILES(BRLITE_BF16),     FORMAT_TILES(BRLITE_INT8_F16),
    FORMAT_TILES(BRLITE_INT4),   FORMAT_TILES(BRLITE_INT4_MIN), FORMAT_TILES(BRLITE_INT4_ZERO),
    FORMAT_TILES(BRLITE_Q4_K),   FORMAT_TILES(BRLITE_Q6_K),     FORMAT_TILES(BRLITE_IQ4_NL),
    FORMAT_TILES(BRLITE_IQ4_NL), FORMAT_TILES(BRLITE_IQ4_NL)};
#undef FORMAT_TILES
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

// The rows of a block of int8 activations. Blocks are of equal size: 8 rows are 4 + 4.
static_assert(MAX_ROWS <= MAX_BLOCK_ROWS, "memory for activations is padded to whole blocks");
INLINE int rows_of_block(int num_rows) {
    const int num_blocks = larger(1, (num_rows + MAX_ROWS - 1) / MAX_ROWS);
    return larger(1, (num_rows + num_blocks - 1) / num_blocks);
}

// One panel or two that follow each other, times all rows of a product.
INLINE void multiply_panels(const Product& product, int panel, int num_panels) {
    const brlite_operation& op = product.op;
    const Activations& input = product.input;
    const long bytes = panel_bytes(op.format, op.num_inputs);
    const int begin = product.first_row, end = product.end_row, num_rows = end - begin;
    const int max_rows = num_panels == 1 ? MAX_ROWS_OF_ONE_PANEL : MAX_ROWS;
    const int num_tiles = (num_rows + max_rows - 1) / max_rows;
    float sums[MAX_ROWS * panels_of_tile(MAX_ROWS) * LANES] __attribute__((aligned(64)));
    for (int first = begin, last, tile_index = 1; first < end; first = last, tile_index++) {
        // Tiles of equal size: 8 rows are 4 + 4, not 6 + 2. With int8 activations a tile is in one block.
        last = begin + (int)((long)num_rows * tile_index / num_tiles);
        if (op.has_int8_rows)
            last = smaller(smaller(end, first + max_rows), (first / input.block_rows + 1) * input.block_rows);
        const long first_group = op.has_int8_rows ? input.first_group(first) : first * input.row_size / BRLITE_GROUP;
        const long row_at = op.has_int8_rows ? first_group * BRLITE_GROUP : first * input.row_size;
        // If there is more than one tile, they prefetch the next panels, each a part: all of it in the first tile would
        // take longer than its products.
        const long ahead = num_tiles > 1 ? num_panels * bytes : fetch_ahead(op.format, num_rows);
        const auto& kernels = op.has_int8_rows ? TILE_KERNELS<true> : TILE_KERNELS<false>;
        const int size = last - first, of_tile = smaller(num_panels, panels_of_tile(size));
        for (int p = panel; p < panel + num_panels; p += of_tile) {
            const Tile tile = {(const uint8_t*)op.weight + p * bytes,
                               bytes,
                               (const uint8_t*)input.rows + row_at * element_bytes(op),
                               input.groups + first_group,
                               input.row_size,
                               input.block_rows,
                               padded_inputs(op.num_inputs),
                               sums,
                               op.format,
                               table_of(op.format),
                               tile_index - 1,
                               num_tiles,
                               ahead};
            // Prefetch the output: its rows are far apart, each in another memory page.
            const float* out = product.output + (long)first * op.row_size + p * LANES;
            for (int r = 0; r < size; r++) __builtin_prefetch(out + r * (long)op.row_size, 1);
            kernels[op.format][of_tile - 1][size - 1](tile);
            for (int i = 0; i < of_tile; i++) finish_tile(product, sums + i * size * LANES, first, size, p + i);
        }
    }
}

// Threads divide a matrix in units of as many panels as a tile has.
struct Units {
    int num_panels, panels_each;
    Units(const Product& product)
        : num_panels(rounded_up(product.op.num_outputs, LANES) / LANES),
          panels_each(panels_of_tile(product.end_row - product.first_row)) {}
    int count() const { return (num_panels + panels_each - 1) / panels_each; }
    void multiply(const Product& product, int unit) const {
        const int panel = unit * panels_each;
        multiply_panels(product, panel, smaller(panels_each, num_panels - panel));
    }
};

// The panels that this thread takes: those of its own part of the matrix, then what other threads have left of theirs.
// They are consecutive, and the next one is seldom another thread's. So prefetches are not lost: on two Zen 3 cores a
// step of up to 16 rows is 1.02 to 1.06 times as fast as with parts that follow each other in the order of taking.
static void linear(const Product& product, Counter* parts, int thread, int num_threads) {
    const Units units(product);
    for (int i = 0; i < num_threads; i++) {
        const int part = (thread + i) % num_threads;
        const int begin = (int)((long)units.count() * part / num_threads);
        const int size = (int)((long)units.count() * (part + 1) / num_threads) - begin;
        for (int unit, end; parts[part].take_share(size, unit, end);)
            for (; unit < end; unit++) units.multiply(product, begin + unit);
    }
}

// All panels times the rows [first, end).
static void linear_of_rows(const brlite_operation& op, const Activations& input, int first, int end) {
    const Product product = {op, input, op.output, first, end};
    const Units units(product);
    for (int unit = 0; unit < units.count(); unit++) units.multiply(product, unit);
}

}  // namespace BRLITE_ISA
}  // namespace brlite
