// A toy model for the self-test: two layers with every operation; weights and cache are random numbers.
#pragma once

#include <list>
#include <vector>

#include "brlite.h"

namespace brlite {

class Random {  // xorshift32 (Marsaglia 2003): the same numbers on every machine
 public:
    uint32_t word();
    int below(int limit) { return (int)(word() % (uint32_t)limit); }
    float around_zero(float limit);
    // Mostly small numbers; some are zero, some large, some subnormal.
    float weight();

 private:
    uint32_t state_ = 2463534242u;
};

class Toy {
 public:
    // Sizes are not multiples of panels or groups, except where they must be.
    static constexpr int HIDDEN = 24, INNER = 40, VOCABULARY = 150;
    static constexpr int HEADS = 4, KV_HEADS = 2, HEAD_DIM = 24, ROTARY_DIM = 16;
    static constexpr int ATTENDED = HEADS * HEAD_DIM, QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
    static constexpr int MAX_ROWS = 32, NUM_SEQUENCES = 4, PAGES_PER_BLOCK = 2;

    // The cache is full of random numbers, so a token at any position can be computed without a prompt.
    Toy(int weight_format, int kv_format, bool has_int8_rows, int blocks_of_sequence);
    Toy(const Toy&) = delete;
    Toy& operator=(const Toy&) = delete;

    const brlite_plan& plan() const { return plan_; }
    const std::vector<uint8_t>& cache() const { return cache_; }

 private:
    // Rows are padded to whole groups, since SILU reads its second half in whole groups, too.
    struct Rows {
        std::vector<float> data;
        int row_size;
        explicit Rows(int size);
    };

    const float* vector(int size, float base, float spread);
    const void* matrix(int num_outputs, int num_inputs);
    const void* quantized_matrix(int num_outputs, int num_inputs);
    const void* matrix_of_blocks(int num_outputs, int num_inputs);
    const void* table(int num_rows, int size);
    brlite_operation reading(int kind, Rows& input, int num_inputs);
    brlite_operation writing(int kind, Rows& output, int num_outputs);
    brlite_operation linear(int kind, Rows& output, int num_outputs, int num_inputs);
    brlite_operation embed();
    brlite_operation norm();
    void add_layer(uint8_t* pages, int window);
    void fill_cache(int num_blocks);

    const int weight_format_, kv_format_;
    const bool has_int8_rows_;
    Random random_;
    std::list<std::vector<float>> vectors_;
    std::list<std::vector<uint8_t>> matrices_;
    Rows hidden_{HIDDEN}, qkv_{QKV}, attended_{ATTENDED}, gate_up_{3 * INNER}, logits_{VOCABULARY};
    std::vector<uint8_t> cache_;
    std::vector<brlite_operation> body_;
    brlite_plan plan_{};
};

}  // namespace brlite
