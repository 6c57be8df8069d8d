// Checks that an instruction set gives the same bits as the generic kernels: both compute the same batches of a toy
// model, in every precision. Runs at each start of a server, so it must be fast.
#include <string.h>

#include <new>
#include <vector>

#include "brlite.h"
#include "isas.h"
#include "toy.h"

namespace brlite {

namespace {

constexpr int NUM_LOGPROBS = 5;

struct Case {
    int weight_format;
    int kv_format;
    int num_threads;
    bool has_int8_rows;
};
constexpr Case CASES[] = {{BRLITE_INT8, BRLITE_INT8, 1, false},     {BRLITE_INT8, BRLITE_BF16, 2, false},
                          {BRLITE_BF16, BRLITE_BF16, 1, false},     {BRLITE_INT4, BRLITE_BF16, 2, false},
                          {BRLITE_INT4_MIN, BRLITE_INT8, 1, false}, {BRLITE_INT4_ZERO, BRLITE_BF16, 1, false},
                          {BRLITE_INT8_F16, BRLITE_INT8, 1, false}, {BRLITE_INT8, BRLITE_BF16, 1, true},
                          {BRLITE_INT8_F16, BRLITE_BF16, 2, true},  {BRLITE_INT4, BRLITE_INT8, 1, true},
                          {BRLITE_INT4_MIN, BRLITE_BF16, 1, true},  {BRLITE_INT4_ZERO, BRLITE_BF16, 2, true},
                          {BRLITE_Q4_K, BRLITE_INT8, 2, false},     {BRLITE_Q6_K, BRLITE_BF16, 1, false},
                          {BRLITE_Q4_K, BRLITE_BF16, 1, true},      {BRLITE_Q6_K, BRLITE_INT8, 2, true}};

struct SomeTokens {
    int sequence;
    int start;
    int num_rows;
};
struct Tokens {
    int num_spans;
    SomeTokens spans[Toy::NUM_SEQUENCES];
};
constexpr Tokens BATCHES[] = {
    {4,
     {{0, 0, 13}, {1, 253, 5}, {2, 300, 1}, {3, 255, 1}}},  // prompts, one across a chunk border, and decodes: 20 rows
    {2, {{1, 258, 3}, {2, 301, 1}}},  // so few rows that two threads split the sequences into chunks
    {1, {{2, 302, 1}}},
    {1, {{0, 13, 5}}},
    {2, {{3, 256, 1}, {1, 261, 1}}},
    {1, {{0, 18, 3}}},
    {1, {{0, 262, 11}}},                                        // several blocks of rows that see a whole chunk
    {4, {{0, 273, 9}, {1, 262, 8}, {2, 303, 7}, {3, 257, 4}}},  // so many rows that two threads divide them
    {1, {{0, 282, 30}}},                                        // and attend to each other's
};

// All results of an engine, to be compared bit for bit.
struct Outcome {
    bool is_computed = true;
    std::vector<float> logits;
    std::vector<uint8_t> cache;
    std::vector<int32_t> drawn;
    std::vector<float> logprobs;
};

constexpr int NUM_PARTS = 5;

template <class T>
bool is_same(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// The index of the first part that differs; NUM_PARTS if none does.
int first_difference(const Outcome& a, const Outcome& b) {
    const bool are_same[NUM_PARTS] = {a.is_computed && b.is_computed, is_same(a.logits, b.logits),
                                      is_same(a.cache, b.cache), is_same(a.drawn, b.drawn),
                                      is_same(a.logprobs, b.logprobs)};
    int part = 0;
    while (part < NUM_PARTS && are_same[part]) part++;
    return part;
}

// Greedy, sampled with every parameter, and a reported target.
std::vector<brlite_draw> ways_to_draw() {
    static const int32_t ids[] = {2, 30, 31, 149}, counts[] = {0, 1, 3, 2};
    static const float biases[] = {1.5f, -2.0f, 30.0f, -100.0f};
    brlite_draw greedy{};
    greedy.target = -1;
    greedy.top_k = Toy::VOCABULARY;
    greedy.top_p = greedy.typical_p = 1.0;
    greedy.repetition_penalty = 1.0f;
    greedy.num_logprobs = NUM_LOGPROBS;
    brlite_draw sampled = greedy;
    sampled.temperature = 0.8f;
    brlite_draw truncated = sampled;
    truncated.top_k = 20;
    truncated.top_p = 0.9;
    truncated.num_logprobs = -1;
    brlite_draw likely = sampled;
    likely.min_p = 0.05;
    likely.top_n_sigma = 1.5;
    brlite_draw banded = sampled;
    banded.typical_p = 0.7;
    banded.dynatemp_range = 0.3;
    banded.xtc_probability = 1;
    banded.xtc_threshold = 0.1;
    brlite_draw penalised = sampled;
    penalised.num_biases = penalised.num_counted = 4;
    penalised.num_banned = 2;
    penalised.bias_ids = penalised.counted_ids = penalised.banned_ids = ids;
    penalised.biases = biases;
    penalised.output_counts = counts;
    penalised.repetition_penalty = 1.3f;
    penalised.presence_penalty = 0.5f;
    penalised.frequency_penalty = 0.25f;
    static const int32_t words[(Toy::VOCABULARY + 31) / 32] = {0x11111111, 0x70000007, 0, -1};
    brlite_draw masked = penalised;
    masked.mask = words;
    brlite_draw reported = greedy;
    reported.target = 7;
    return {greedy, sampled, truncated, likely, banded, penalised, masked, reported};
}

// A batch with a draw for every row, and memory for the results.
class Batch {
 public:
    explicit Batch(const Tokens& tokens) {
        for (int i = 0; i < tokens.num_spans; i++) add_span(tokens.spans[i], block_tables_[i]);
        add_draws();
    }

    void run(brlite_engine* engine, Outcome& outcome) {
        const int32_t num_rows = (int32_t)token_ids_.size(), num_spans = (int32_t)spans_.size();
        const brlite_batch batch = {
            num_rows,      num_spans, num_rows, 0, token_ids_.data(), spans_.data(), draws_.data(),
            drawn_.data(), nullptr,   0,        0};
        outcome.is_computed &= brlite_run(engine, &batch) == 0;
        for (const brlite_drawn& drawn : drawn_) {
            outcome.drawn.push_back(drawn.token);
            outcome.logprobs.push_back(drawn.logprob);
        }
        outcome.drawn.insert(outcome.drawn.end(), top_ids_.begin(), top_ids_.end());
        outcome.logprobs.insert(outcome.logprobs.end(), top_logprobs_.begin(), top_logprobs_.end());
        outcome.logits.insert(outcome.logits.end(), logits_.begin(), logits_.end());
    }

 private:
    void add_span(const SomeTokens& tokens, std::vector<int32_t>& block_table) {
        for (int block = 0; block < Toy::BLOCKS_OF_SEQUENCE; block++)  // blocks of a sequence are not adjacent
            block_table.push_back(block * Toy::NUM_SEQUENCES + tokens.sequence);
        spans_.push_back({tokens.start, (int32_t)token_ids_.size(), tokens.num_rows, 0, block_table.data()});
        for (int i = 0; i < tokens.num_rows; i++) token_ids_.push_back((tokens.start + 7 * i) % Toy::VOCABULARY);
    }

    void add_draws() {
        const std::vector<brlite_draw> ways = ways_to_draw();
        const size_t num_rows = token_ids_.size();
        top_ids_.resize(num_rows * NUM_LOGPROBS);
        top_logprobs_.resize(num_rows * NUM_LOGPROBS);
        logits_.resize(num_rows * Toy::VOCABULARY);
        for (size_t row = 0; row < num_rows; row++) {
            draws_.push_back(ways[row % ways.size()]);
            draws_[row].row = (int32_t)row;
            draws_[row].logits = &logits_[row * Toy::VOCABULARY];
            draws_[row].uniform = (row + 0.5) / Toy::MAX_ROWS;
            drawn_.push_back({0, 0.0f, &top_ids_[row * NUM_LOGPROBS], &top_logprobs_[row * NUM_LOGPROBS]});
        }
    }

    std::vector<int32_t> block_tables_[Toy::NUM_SEQUENCES], token_ids_, top_ids_;
    std::vector<float> top_logprobs_, logits_;
    std::vector<brlite_span> spans_;
    std::vector<brlite_draw> draws_;
    std::vector<brlite_drawn> drawn_;
};

Outcome compute(Toy& toy, int isa, int num_threads) {
    toy.reset();
    brlite_engine* engine = brlite_create(&toy.plan(), isa, num_threads);
    if (!engine) throw std::bad_alloc();
    Outcome outcome;
    for (const Tokens& tokens : BATCHES) Batch(tokens).run(engine, outcome);
    brlite_destroy(engine);
    outcome.cache = toy.cache();
    return outcome;
}

constexpr int32_t NOT_THERE = 1, NO_MEMORY = 2, FIRST_CHECK = 3;

// 0, or the number of the failed check: FIRST_CHECK + NUM_PARTS * case + part.
int32_t first_failed_check(int isa) {
    int32_t check = FIRST_CHECK;
    for (const Case& one : CASES) {
        Toy toy(one.weight_format, one.kv_format, one.has_int8_rows);
        const Outcome expected = compute(toy, BRLITE_GENERIC, 1), outcome = compute(toy, isa, one.num_threads);
        const int part = first_difference(outcome, expected);
        if (part < NUM_PARTS) return check + part;
        check += NUM_PARTS;
    }
    return 0;
}

}  // namespace

}  // namespace brlite

extern "C" {

int32_t brlite_self_test(int32_t isa) {
    if (!brlite::kernels_of(isa)) return brlite::NOT_THERE;
    try {
        return brlite::first_failed_check(isa);
    } catch (const std::bad_alloc&) {
        return brlite::NO_MEMORY;
    }
}

}  // extern "C"
