// Multiplies matrices of all formats, of some sizes, by all numbers of rows that take other tiles, and prints a hash of
// the results of each format. The flags of the compiler choose the instruction set.
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "isa.h"
#include "linear.h"
#include "rows.h"

using namespace brlite;
using namespace brlite::BRLITE_ISA;

constexpr int MAX_TESTED_ROWS = 41;

static uint32_t state;
static uint32_t random_number() { return (state = state * 1664525 + 1013904223) >> 8; }
static uint16_t random_half() { return (uint16_t)(0x2c00 + random_number() % 1024); }  // fp16: 1/16 to 1/8

// Memory as the engine has it, aligned, but full of NaN: what nobody has written must not change a result.
struct Bytes {
    uint8_t* data;
    explicit Bytes(size_t size) : data((uint8_t*)aligned_alloc(64, (size + 63) / 64 * 64)) { memset(data, 0xff, size); }
    ~Bytes() { free(data); }
};

// Codes of any bits; scales, minimums and zero points that a matrix could have.
static void fill_panel(int format, int num_inputs, uint8_t* panel) {
    uint16_t* halves = (uint16_t*)panel;
    if (format == BRLITE_BF16) {
        for (int i = 0; i < num_inputs * LANES; i++)
            halves[i] = (uint16_t)(0x3c00 + random_number() % 512 + (random_number() % 2 << 15));
        return;
    }
    for (int first = 0; first < num_inputs; first += group_inputs(format)) {
        if (has_blocks(format) && first % BRLITE_BLOCK == 0) {
            for (int i = 0; i < block_head_bytes(format) / 2; i++) ((uint16_t*)panel)[i] = random_half();
            panel += block_head_bytes(format);
        }
        for (int i = 0; i < group_bytes(format); i++) panel[i] = (uint8_t)random_number();
        uint16_t* scales = (uint16_t*)(panel + code_bytes(format));
        for (int i = 0; i < scale_bytes(format) && !has_blocks(format); i++) {
            if (format == BRLITE_MXFP4)
                panel[code_bytes(format) + i] = (uint8_t)(110 + random_number() % 20);
            else
                scales[i] = format == BRLITE_INT8 ? (uint16_t)(0x3c00 + random_number() % 256) : random_half();
            if (format == BRLITE_INT4_ZERO && i >= LANES) scales[i] = 0x4400;  // 4.0
        }
        panel += group_bytes(format);
    }
}

struct Case {
    int format, num_inputs, num_outputs;
    bool has_int8_rows;
};

// Adds to `hash` the results of `num_rows` rows, which two threads compute if there are many.
static uint64_t multiply_rows(const Case& of, const uint8_t* weight, int kind, int num_rows, uint64_t hash) {
    const int row_size = of.num_outputs;
    const size_t size = (size_t)(num_rows + MAX_BLOCK_ROWS) * of.num_inputs;
    Bytes rows(size * sizeof(float)), scales(num_rows * sizeof(float)),
        groups(size / BRLITE_GROUP * sizeof(ActivationGroup)), quads(MAX_TILE_PANELS * quads_bytes(of.num_inputs));
    Activations input = {rows.data, (float*)scales.data, of.num_inputs, (ActivationGroup*)groups.data, 1, false};
    if (of.has_int8_rows) {
        input.block_rows = rows_of_block(num_rows);
        input.shares_quads = shares_quads(num_rows);
    }
    brlite_operation op{};
    op.kind = kind;
    op.format = of.format;
    op.has_int8_rows = of.has_int8_rows;
    op.num_inputs = of.num_inputs;
    op.num_outputs = op.row_size = of.num_outputs;
    op.weight = weight;
    std::vector<float> values(of.num_inputs), output((size_t)num_rows * row_size, 0.25f);
    for (int row = 0; row < num_rows; row++) {
        for (float& value : values) value = ((int)(random_number() % 2001) - 1000) * 1e-3f;
        write_input(input, op, row, values.data(), of.num_inputs);
    }
    const int cut = num_rows > 20 ? num_rows / 3 : 0;
    if (cut) linear_of_rows({op, input, output.data(), 0, cut, quads.data});
    linear_of_rows({op, input, output.data(), cut, num_rows, quads.data});
    for (float value : output) {
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        hash = (hash ^ bits) * 1099511628211u;
    }
    return hash;
}

int main() {
    for (int format = 0; format < BRLITE_NUM_FORMATS; format++)
        for (const bool has_int8_rows : {false, true}) {
            if (format == BRLITE_BF16 && has_int8_rows) continue;
            uint64_t hash = 0;
            for (const int num_inputs : {96, 256})
                for (const int num_outputs : {16, 48, 80, 112}) {
                    if (has_blocks(format) && num_inputs % BRLITE_BLOCK != 0) continue;
                    const long bytes = panel_bytes(format, num_inputs);
                    const int num_panels = num_outputs / LANES;
                    Bytes weight(bytes * num_panels);
                    state = 1;
                    for (int p = 0; p < num_panels; p++) fill_panel(format, num_inputs, weight.data + p * bytes);
                    for (int num_rows = 1; num_rows <= MAX_TESTED_ROWS; num_rows += num_rows < 24 ? 1 : 8)
                        for (const int kind : {BRLITE_LINEAR, BRLITE_ADD})
                            hash = multiply_rows({format, num_inputs, num_outputs, has_int8_rows}, weight.data, kind,
                                                 num_rows, hash);
                }
            printf("%d %d %016llx\n", format, has_int8_rows, (unsigned long long)hash);
        }
}
