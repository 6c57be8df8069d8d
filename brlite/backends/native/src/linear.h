// LINEAR and ADD: a matrix times rows of activations. Threads divide the panels of the matrix among themselves. Panels
// stay in the L2 cache while all rows are multiplied by them, a few rows (a tile) at a time.
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

// How many rows a tile has, and how many panels that follow each other.
struct Shape {
    int min_rows, max_rows, panels;
};

// The shapes of tiles. With AVX-512 sums and totals are in registers, and a load takes as long as two products: two or
// three panels share the load of an activation. Few rows take one panel at a time, so that a matrix is read as one
// stream in memory order: with two or four panels side by side, rows of 576 inputs reached half of the memory
// bandwidth.
enum { SINGLE, WIDE, TALL };
#if defined(BRLITE_HAS_AVX512)
constexpr Shape SHAPES[] = {{1, 2, 1}, {3, 4, 3}, {4, MAX_ROWS, 2}};
#else
constexpr Shape SHAPES[] = {{1, MAX_ROWS, 1}};
#endif
constexpr int NUM_SHAPES = sizeof SHAPES / sizeof *SHAPES, MAX_TILE_SUMS = 12;

// From this many rows on, tiles of int8 activations share quads. With fewer rows, which wait for memory, that made a
// step slower.
constexpr bool shares_quads(int num_rows) { return KEEPS_QUADS && num_rows >= 18; }

INLINE int shape_of(int num_rows, bool has_int8_rows, const Activations& input) {
    if (NUM_SHAPES == 1 || num_rows <= SHAPES[SINGLE].max_rows) return SINGLE;
    if (KEEPS_QUADS && has_int8_rows) return num_rows == 3 || input.shares_quads ? WIDE : TALL;
    return num_rows <= 4 || num_rows == 7 || num_rows == 8 ? WIDE : TALL;
}

// Some rows times the panels of a shape.
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
    uint8_t* quads;        // memory for those of all panels, if tiles share them
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
    Floats scales, offsets, bias;

    INLINED Scaling(int format, const uint8_t* group, const Factors& factors) {
        scales = scales_of(format, group + code_bytes(FORMAT), factors);
        if constexpr (has_offsets(FORMAT)) offsets = offsets_of(FORMAT, group + code_bytes(FORMAT), factors);
        if (SUM_BIAS) bias = splat(-SUM_BIAS) * scales;
    }

    // Adds the activations times the weights of a group to `total`, from the sum of activations times codes.
    // `activations` is read for int8 activations and for formats with offsets. Products with a biased sum are exact
    // until the bias is gone: scales have at most 19 bits.
    template <bool HAS_INT8_ROWS>
    INLINED Floats added(Floats total, Floats sum, const ActivationGroup& activations) const {
        if constexpr (has_offsets(FORMAT) && !has_minimums(FORMAT)) sum = fused(-offsets, splat(activations.sum), sum);
        if constexpr (HAS_INT8_ROWS)
            total = fused(SUM_BIAS ? fused(sum, scales, bias) : sum * scales, splat(activations.scale), total);
        else
            total = fused(sum, scales, total);
        if constexpr (has_minimums(FORMAT)) total = fused(offsets, splat(activations.scaled_sum), total);
        return total;
    }
};

// Activations are int16, or int8 with a scale for each group. Integer sums are exact in any order. The sum of a group
// of 4-bit codes is exact as a float, too, with and without the zero point's part; so is that of 16 6-bit codes.
template <int FORMAT, int ROWS, int PANELS, bool HAS_INT8_ROWS, bool HAS_QUADS>
static void multiply_integers(const Tile& tile) {
    constexpr bool IS_BESIDE =
        pairs_of_line(FORMAT, ROWS) && !(HAS_INT8_ROWS && code_bits(FORMAT) < 8 && !has_table(FORMAT));
    // One kernel computes all formats with a table: its time does not depend on reading their scales.
    const int format = has_table(FORMAT) ? tile.format : FORMAT;
    const long bytes = group_bytes(format);
    const uint8_t* groups[PANELS];
    uint8_t* quads[PANELS];
    Factors factors[PANELS];
    Floats totals[ROWS][PANELS];
    UNROLLED for (int p = 0; p < PANELS; p++) {
        groups[p] = tile.panel + p * tile.panel_bytes;
        quads[p] = tile.quads + p * quads_bytes(tile.num_inputs);
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
            sum_group<FORMAT, HAS_QUADS>(sums, groups, quads, tile.quads,
                                         (const GroupedRow*)tile.rows + first_group * BRLITE_GROUP, BRLITE_GROUP,
                                         activations, half, tile.table);
        else
            sum_integers<FORMAT>(sums, groups, (const Int8::Row*)tile.rows + first, tile.row_size, activations, half,
                                 tile.table);
        UNROLLED for (int p = 0; p < PANELS; p++) {
            const Scaling<FORMAT> scaling(format, groups[p], factors[p]);
            UNROLLED for (int r = 0; r < ROWS; r++) totals[r][p] =
                scaling.template added<HAS_INT8_ROWS>(totals[r][p], sums[r][p], activations[r]);
            groups[p] += bytes;
            quads[p] += quads_bytes(group_inputs(FORMAT));
        }
    }
    UNROLLED for (int p = 0; p < PANELS; p++) UNROLLED for (int r = 0; r < ROWS; r++)
        store(tile.out + (p * ROWS + r) * LANES, totals[r][p]);
}

template <int ROWS, int PANELS>
static void multiply_bf16(const Tile& tile) {
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

typedef void (*TileKernel)(const Tile&);

// The kernel of a tile that has `more_rows` rows more than the least of its shape; null if there is none.
template <int FORMAT, int SHAPE, int MORE_ROWS, bool HAS_INT8_ROWS, bool HAS_QUADS>
constexpr TileKernel tile_kernel() {
    constexpr Shape shape = SHAPES[smaller(SHAPE, NUM_SHAPES - 1)];
    constexpr int rows = shape.min_rows + MORE_ROWS;
    if constexpr (SHAPE >= NUM_SHAPES || rows > shape.max_rows)
        return nullptr;
    else if constexpr (HAS_QUADS && (!KEEPS_QUADS || SHAPE != WIDE || FORMAT == BRLITE_BF16))
        return nullptr;
    else if constexpr (FORMAT == BRLITE_BF16)
        return multiply_bf16<rows, shape.panels>;
    else
        return multiply_integers<FORMAT, rows, shape.panels, HAS_INT8_ROWS, HAS_QUADS>;
}

// By format, shape, and rows more than the least of the shape.
#define TILE(f, shape, more) tile_kernel<f, shape, more, HAS_INT8_ROWS, HAS_QUADS>()
#define TILES(f, shape) \
    {TILE(f, shape, 0), TILE(f, shape, 1), TILE(f, shape, 2), TILE(f, shape, 3), TILE(f, shape, 4), TILE(f, shape, 5)}
#define FORMAT_TILES(f) {TILES(f, 0), TILES(f, 1), TILES(f, 2)}
template <bool HAS_INT8_ROWS, bool HAS_QUADS>
static constexpr TileKernel TILE_KERNELS[BRLITE_NUM_FORMATS][3][6] = {
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
    uint8_t* quads;  // a thread's memory for those of the panels of a tile
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

// The rows of a block of int8 activations. Blocks are of equal size: 7 rows are 4 + 3.
static_assert(MAX_ROWS <= MAX_BLOCK_ROWS, "memory for activations is padded to whole blocks");
INLINE int rows_of_block(int num_rows) {
    const int max_rows = shares_quads(num_rows) ? SHAPES[WIDE % NUM_SHAPES].max_rows : MAX_ROWS;
    const int num_blocks = larger(1, (num_rows + max_rows - 1) / max_rows);
    return larger(1, (num_rows + num_blocks - 1) / num_blocks);
}

// All rows of a product times the panels of a shape, in units of as many panels as the shape has. Threads divide these.
struct Units {
    const Product& product;
    const brlite_operation& op = product.op;
    const Activations& input = product.input;
    const int num_rows = product.end_row - product.first_row;
    const int num_panels = rounded_up(op.num_outputs, LANES) / LANES;
    const long bytes = panel_bytes(op.format, op.num_inputs);
    int shape_number;
    Shape shape;

    explicit Units(const Product& of) : product(of), shape_number(shape_of(num_rows, op.has_int8_rows, input)) {
        if (SHAPES[shape_number].panels > num_panels) shape_number = SINGLE;
        shape = SHAPES[shape_number];
    }

    int count() const { return (num_panels + shape.panels - 1) / shape.panels; }

    void multiply(int unit) const {
        // The last unit multiplies panels of the one before again, so that it is whole.
        const int first_panel = unit * shape.panels, panel = smaller(first_panel, num_panels - shape.panels);
        const int num_tiles = (num_rows + shape.max_rows - 1) / shape.max_rows;
        const bool shares_quads = KEEPS_QUADS && op.has_int8_rows && shape_number == WIDE && num_tiles > 1;
        float sums[MAX_TILE_SUMS * LANES] __attribute__((aligned(64)));
        for (int first = product.first_row, last, i = 0; first < product.end_row; first = last, i++) {
            // Tiles of equal size: 8 rows are 4 + 4, not 6 + 2. With int8 activations a tile is in one block.
            last = product.first_row + (int)((long)num_rows * (i + 1) / num_tiles);
            if (op.has_int8_rows)
                last = smaller(smaller(product.end_row, first + shape.max_rows),
                               (first / input.block_rows + 1) * input.block_rows);
            const long first_group =
                op.has_int8_rows ? input.first_group(first) : first * input.row_size / BRLITE_GROUP;
            const long row_at = op.has_int8_rows ? first_group * BRLITE_GROUP : first * input.row_size;
            const Tile tile = {(const uint8_t*)op.weight + panel * bytes,
                               bytes,
                               (const uint8_t*)input.rows + row_at * element_bytes(op),
                               input.groups + first_group,
                               input.row_size,
                               input.block_rows,
                               padded_inputs(op.num_inputs),
                               sums,
                               op.format,
                               table_of(op.format),
                               shares_quads ? product.quads : nullptr,
                               i,
                               num_tiles,
                               ahead(num_tiles)};
            const auto& kernels = shares_quads && i > 0 ? TILE_KERNELS<true, true>
                                  : op.has_int8_rows    ? TILE_KERNELS<true, false>
                                                        : TILE_KERNELS<false, false>;
            // Rows that a tile of a block lacks are computed from those that follow in memory, and not written.
            const int size = larger(last - first, shape.min_rows);
            fetch_outputs(first, last, first_panel);
            kernels[op.format][shape_number][size - shape.min_rows](tile);
            for (int p = first_panel; p < panel + shape.panels; p++)
                finish_tile(product, sums + (p - panel) * size * LANES, first, last - first, p);
        }
    }

    // How far ahead a tile prefetches. If there is more than one tile, they prefetch the next panels, each a part: all
    // of it in the first tile would take longer than its products.
    long ahead(int num_tiles) const { return num_tiles > 1 ? shape.panels * bytes : fetch_ahead(op.format, num_rows); }

    // The outputs of rows are far apart, each in another memory page.
    void fetch_outputs(int first, int last, int panel) const {
        const float* out = product.output + (long)first * op.row_size + panel * LANES;
        for (int r = first; r < last; r++, out += op.row_size) __builtin_prefetch(out, 1);
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
            for (; unit < end; unit++) units.multiply(begin + unit);
    }
}

// All panels.
static void linear_of_rows(const Product& product) {
    const Units units(product);
    for (int unit = 0; unit < units.count(); unit++) units.multiply(unit);
}

}  // namespace BRLITE_ISA
}  // namespace brlite
