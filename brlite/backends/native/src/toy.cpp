#include "toy.h"

#include <string.h>

#include "step.h"

namespace brlite {

namespace {

constexpr int WINDOWS[] = {0, 37};  // attention window by layer; 0: none
constexpr int NUM_LAYERS = 2;
// 0 to 15 in half precision.
constexpr uint16_t WHOLE_NUMBERS[] = {0x0000, 0x3c00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4600, 0x4700,
                                      0x4800, 0x4880, 0x4900, 0x4980, 0x4a00, 0x4a80, 0x4b00, 0x4b80};

}  // namespace

uint32_t Random::word() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 17;
    state_ ^= state_ << 5;
    return state_;
}

float Random::around_zero(float limit) { return ((float)(word() >> 8) / 8388608.0f - 1.0f) * limit; }

float Random::weight() {
    const int kind = below(64);
    if (kind == 0) return 0.0f;
    return around_zero(kind == 1 ? 5.0f : kind == 2 ? 1e-39f : 0.2f);
}

Toy::Rows::Rows(int size) : row_size(rounded(size, 2 * BRLITE_GROUP)) { data.resize((MAX_ROWS + 1) * row_size); }

Toy::Toy(int weight_format, int kv_format, bool has_int8_rows, int blocks_of_sequence)
    : weight_format_(weight_format), kv_format_(kv_format), has_int8_rows_(has_int8_rows) {
    const int num_blocks = NUM_SEQUENCES * blocks_of_sequence;
    const int num_positions = blocks_of_sequence * PAGES_PER_BLOCK * BRLITE_LANES;
    fill_cache(num_blocks);
    body_.push_back(embed());
    for (int layer = 0; layer < NUM_LAYERS; layer++)
        add_layer(cache_.data() + layer * (cache_.size() / NUM_LAYERS), WINDOWS[layer]);
    plan_.body = body_.data();
    plan_.num_operations = (int32_t)body_.size();
    plan_.max_rows = MAX_ROWS;
    plan_.vocab_size = VOCABULARY;
    plan_.max_blocks = num_blocks;
    plan_.norm = norm();
    plan_.head = linear(BRLITE_LINEAR, logits_, VOCABULARY, HIDDEN);
    plan_.logits = logits_.data.data();
    const float* cos = vector(num_positions * ROTARY_DIM / 2, 0.0f, 1.0f);
    const float* sin = vector(num_positions * ROTARY_DIM / 2, 0.0f, 1.0f);
    const int is_interleaved = weight_format == BRLITE_BF16;
    plan_.attention = {HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, is_interleaved, kv_format, PAGES_PER_BLOCK, num_positions,
                       0.2f,  0,        cos,      sin};
}

const float* Toy::vector(int size, float base, float spread) {
    std::vector<float>& numbers = vectors_.emplace_back(rounded(size, BRLITE_GROUP));
    for (int i = 0; i < size; i++) numbers[i] = base + random_.around_zero(spread);
    return numbers.data();
}

const void* Toy::matrix(int num_outputs, int num_inputs) {
    if (has_blocks(weight_format_) || has_table(weight_format_)) return matrix_of_blocks(num_outputs, num_inputs);
    if (weight_format_ != BRLITE_INT8 && weight_format_ != BRLITE_BF16)
        return quantized_matrix(num_outputs, num_inputs);
    std::vector<float> weights((size_t)num_outputs * num_inputs);
    for (float& weight : weights) weight = random_.weight();
    memset(weights.data() + 3 * num_inputs, 0, num_inputs * sizeof(float));  // padded vocabularies have rows of zeros
    auto& panels = matrices_.emplace_back(brlite_packed_bytes(weight_format_, num_outputs, num_inputs));
    brlite_pack(weight_format_, weights.data(), 0, num_outputs, num_inputs, panels.data());
    return panels.data();
}

// Random codes. Scales and minimums in half precision from 2^-24 to 2^-2; minimums of both signs. Zero points 0 to 15.
const void* Toy::quantized_matrix(int num_outputs, int num_inputs) {
    const int num_groups = rounded(num_inputs, BRLITE_GROUP) / BRLITE_GROUP * num_outputs;
    std::vector<uint8_t> codes((size_t)num_groups * BRLITE_GROUP);
    std::vector<uint16_t> scales(num_groups), offsets(num_groups);
    for (uint8_t& code : codes) code = (uint8_t)random_.below(weight_format_ == BRLITE_INT8_F16 ? 256 : 16);
    for (uint16_t& scale : scales) scale = (uint16_t)random_.below(0x3400);
    for (uint16_t& offset : offsets)
        offset = weight_format_ == BRLITE_INT4_ZERO ? WHOLE_NUMBERS[random_.below(16)]
                                                    : (uint16_t)(random_.below(0x3400) | random_.below(2) << 15);
    auto& panels = matrices_.emplace_back(brlite_packed_bytes(weight_format_, num_outputs, num_inputs));
    brlite_pack_codes(weight_format_, codes.data(), scales.data(), offsets.data(), 0, num_outputs,
                      rounded(num_inputs, BRLITE_GROUP), panels.data());
    return panels.data();
}

// Any bytes, but for the numbers in half precision: from 2^-24 to 2^-6; and for exponents: scales from 2^-15 to 1.
const void* Toy::matrix_of_blocks(int num_outputs, int num_inputs) {
    struct Block {
        size_t bytes, first_half, num_halves;
    };
    const Block block = weight_format_ == BRLITE_Q4_K     ? Block{144, 0, 2}
                        : weight_format_ == BRLITE_Q6_K   ? Block{210, 208, 1}
                        : weight_format_ == BRLITE_IQ4_XS ? Block{136, 0, 1}
                        : weight_format_ == BRLITE_IQ4_NL ? Block{18, 0, 1}
                                                          : Block{17, 0, 0};
    const int block_inputs = has_blocks(weight_format_) ? BRLITE_BLOCK : BRLITE_GROUP;
    std::vector<uint8_t> blocks((size_t)num_outputs * rounded(num_inputs, block_inputs) / block_inputs * block.bytes);
    for (uint8_t& byte : blocks) byte = (uint8_t)random_.below(256);
    for (size_t at = block.first_half; at < blocks.size(); at += block.bytes) {
        if (!block.num_halves) blocks[at] = (uint8_t)(112 + random_.below(16));
        for (size_t i = 0; i < block.num_halves; i++) {
            const uint16_t half = (uint16_t)random_.below(0x2400);
            memcpy(&blocks[at + 2 * i], &half, sizeof half);
        }
    }
    auto& panels = matrices_.emplace_back(brlite_packed_bytes(weight_format_, num_outputs, num_inputs));
    brlite_pack_blocks(weight_format_, blocks.data(), 0, num_outputs, rounded(num_inputs, BRLITE_GROUP), panels.data());
    return panels.data();
}

// A bfloat16 table: the upper 16 bits of floats.
const void* Toy::table(int num_rows, int size) {
    auto& halves = matrices_.emplace_back((size_t)num_rows * size * 2);
    for (size_t i = 0; i < halves.size(); i += 2) {
        const float number = random_.weight();
        uint32_t bits;
        memcpy(&bits, &number, sizeof bits);
        const uint16_t half = (uint16_t)(bits >> 16);
        memcpy(halves.data() + i, &half, sizeof half);
    }
    return halves.data();
}

brlite_operation Toy::reading(int kind, Rows& input, int num_inputs) {
    brlite_operation operation{};
    operation.kind = kind;
    operation.format = weight_format_;
    operation.has_int8_rows = has_int8_rows_;
    operation.num_inputs = num_inputs;
    operation.row_size = input.row_size;
    operation.input = input.data.data();
    return operation;
}

brlite_operation Toy::writing(int kind, Rows& output, int num_outputs) {
    brlite_operation operation{};
    operation.kind = kind;
    operation.format = weight_format_;
    operation.has_int8_rows = has_int8_rows_;
    operation.num_outputs = num_outputs;
    operation.row_size = output.row_size;
    operation.output = output.data.data();
    return operation;
}

brlite_operation Toy::linear(int kind, Rows& output, int num_outputs, int num_inputs) {
    brlite_operation operation = writing(kind, output, num_outputs);
    operation.num_inputs = num_inputs;
    operation.weight = matrix(num_outputs, num_inputs);
    return operation;
}

brlite_operation Toy::embed() {
    brlite_operation operation = writing(BRLITE_EMBED, hidden_, HIDDEN);
    operation.count = VOCABULARY;
    operation.is_table = weight_format_ == BRLITE_BF16;
    operation.weight = operation.is_table ? table(VOCABULARY, HIDDEN) : matrix(VOCABULARY, HIDDEN);
    return operation;
}

brlite_operation Toy::norm() {
    brlite_operation operation = reading(BRLITE_NORM, hidden_, HIDDEN);
    operation.weight = vector(HIDDEN, 1.0f, 0.5f);
    operation.epsilon = 1e-5f;
    return operation;
}

void Toy::add_layer(uint8_t* pages, int window) {
    brlite_operation qkv = linear(BRLITE_LINEAR, qkv_, QKV, HIDDEN);
    qkv.bias = vector(QKV, 0.0f, 0.5f);
    brlite_operation rope = reading(BRLITE_ROPE, qkv_, window ? 0 : ROTARY_DIM);
    rope.weight = window ? vector(HEAD_DIM, 1.0f, 0.5f) : nullptr;
    rope.bias = window ? vector(HEAD_DIM, 1.0f, 0.5f) : nullptr;
    rope.epsilon = 1e-5f;
    rope.pages = pages;
    brlite_operation attend = writing(BRLITE_ATTEND, attended_, ATTENDED);
    attend.pages = pages;
    attend.window = window;
    body_.insert(body_.end(), {norm(), qkv, rope, attend});
    body_.push_back(reading(BRLITE_QUANTIZE, attended_, ATTENDED));
    body_.push_back(linear(BRLITE_ADD, hidden_, HIDDEN, ATTENDED));
    body_.push_back(norm());
    body_.push_back(linear(BRLITE_LINEAR, gate_up_, 2 * INNER, HIDDEN));
    body_.push_back(reading(BRLITE_SILU, gate_up_, INNER));
    body_.push_back(linear(BRLITE_ADD, hidden_, HIDDEN, INNER));
}

// For int8 any byte and small scales; else bfloat16 numbers from 2^-15 to 4.
void Toy::fill_cache(int num_blocks) {
    const size_t page = brlite_page_bytes(kv_format_, HEAD_DIM);
    const size_t first_scale = 2 * page_part_bytes(kv_format_, rounded(HEAD_DIM, BRLITE_LANES));
    cache_.resize(NUM_LAYERS * num_blocks * PAGES_PER_BLOCK * KV_HEADS * page);
    for (size_t i = 0; i < cache_.size(); i += 4) {
        const uint32_t word = kv_format_ == BRLITE_INT8 ? random_.word() : (random_.word() & 0x87ff87ff) | 0x38003800;
        memcpy(cache_.data() + i, &word, sizeof word);
    }
    for (size_t start = first_scale; start < cache_.size(); start += page)
        for (size_t i = start; i < start + page - first_scale; i += sizeof(float)) {
            const float scale = 0.015f + random_.around_zero(0.014f);
            memcpy(cache_.data() + i, &scale, sizeof scale);
        }
}

}  // namespace brlite
