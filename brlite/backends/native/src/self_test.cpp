// Checks that an instruction set gives the right bits: it computes batches of toy models, one for each precision. Runs
// at each start of a server, so it must be fast. library.py knows the checksums of the results, so the generic kernels
// need not compute them again, which would take four times as long.
#include <new>
#include <vector>

#include "brlite.h"
#include "isas.h"
#include "toy.h"

namespace brlite {

namespace {

constexpr int NUM_LOGPROBS = 5;

struct SomeTokens {
    int sequence;
    int start;
    int num_rows;
};
struct Tokens {
    int max_threads;
    int num_spans;
    SomeTokens spans[Toy::NUM_SEQUENCES];
};
struct Batches {
    int blocks_of_sequence;  // for the last position below
    bool draws_every_way;    // else the best token, without logprobs
    Tokens batches[13];      // fewer end with one without spans
};

// For attention and draws, which do not depend on the format of weights.
constexpr Batches LONG = {
    10,
    true,
    {{2, 4, {{0, 0, 13}, {1, 253, 5}, {2, 300, 1}, {3, 255, 1}}},  // prompts, one across a chunk border; decodes
     {2, 2, {{1, 258, 3}, {2, 301, 1}}},  // so few rows that two threads split the sequences into chunks
     {1, 1, {{2, 302, 1}}},
     {1, 1, {{0, 13, 5}}},
     {1, 2, {{3, 256, 1}, {1, 261, 1}}},
     {1, 1, {{0, 18, 3}}},
     {1, 1, {{0, 262, 11}}},                                        // several blocks of rows that see a whole chunk
     {2, 4, {{0, 273, 9}, {1, 262, 8}, {2, 303, 7}, {3, 257, 4}}},  // so many rows that two threads divide them
     {2, 1, {{0, 282, 30}}}}};                                      // and attend to each other's
// For matrices: so many rows that two threads divide them, and tiles of 1 to 6 rows.
constexpr Batches SHORT = {2,
                           false,
                           {{2, 4, {{0, 0, 9}, {1, 0, 8}, {2, 0, 7}, {3, 0, 4}}},
                            {1, 1, {{0, 9, 12}}},
                            {1, 2, {{1, 8, 10}, {2, 7, 1}}},
                            {1, 1, {{2, 8, 10}}},
                            {1, 1, {{3, 4, 9}}},
                            {1, 2, {{0, 21, 1}, {3, 13, 7}}},
                            {1, 1, {{1, 18, 7}}},
                            {1, 1, {{2, 18, 6}}},
                            {1, 1, {{3, 20, 5}}},
                            {1, 1, {{1, 25, 4}}},
                            {1, 1, {{3, 25, 3}}},
                            {1, 2, {{0, 22, 1}, {2, 24, 1}}},
                            {1, 1, {{1, 29, 1}}}}};

struct Check {
    int weight_format;
    int kv_format;
    int num_threads;
    bool has_int8_rows;
    const Batches& batches;
};
constexpr Check CHECKS[] = {
    {BRLITE_INT8, BRLITE_INT8, 2, false, LONG},      {BRLITE_INT8, BRLITE_BF16, 2, false, LONG},
    {BRLITE_BF16, BRLITE_BF16, 1, false, LONG},      {BRLITE_INT4, BRLITE_BF16, 2, false, SHORT},
    {BRLITE_INT4_MIN, BRLITE_INT8, 1, false, SHORT}, {BRLITE_INT4_ZERO, BRLITE_BF16, 1, false, SHORT},
    {BRLITE_INT8_F16, BRLITE_INT8, 1, false, SHORT}, {BRLITE_INT8, BRLITE_BF16, 1, true, SHORT},
    {BRLITE_INT8_F16, BRLITE_BF16, 2, true, SHORT},  {BRLITE_INT4, BRLITE_INT8, 1, true, SHORT},
    {BRLITE_INT4_MIN, BRLITE_BF16, 1, true, SHORT},  {BRLITE_INT4_ZERO, BRLITE_BF16, 2, true, SHORT},
    {BRLITE_Q4_K, BRLITE_INT8, 2, false, SHORT},     {BRLITE_Q6_K, BRLITE_BF16, 1, false, SHORT},
    {BRLITE_Q4_K, BRLITE_BF16, 1, true, SHORT},      {BRLITE_Q6_K, BRLITE_INT8, 2, true, SHORT},
    {BRLITE_IQ4_NL, BRLITE_BF16, 2, false, SHORT},   {BRLITE_IQ4_XS, BRLITE_INT8, 1, true, SHORT},
    {BRLITE_MXFP4, BRLITE_BF16, 1, false, SHORT}};
constexpr int NUM_CHECKS = sizeof CHECKS / sizeof *CHECKS;

class Checksum {
 public:
    template <class T>
    void add(const std::vector<T>& numbers) {
        value_ = value_ * 31 + brlite_checksum(nullptr, numbers.data(), numbers.size() * sizeof(T));
    }
    uint64_t value() const { return value_; }

 private:
    uint64_t value_ = 0;
};

brlite_draw best_token() {
    brlite_draw greedy{};
    greedy.target = greedy.num_logprobs = -1;
    greedy.top_k = Toy::VOCABULARY;
    greedy.top_p = greedy.typical_p = 1.0;
    greedy.repetition_penalty = 1.0f;
    return greedy;
}

// Greedy, sampled with every parameter, and a reported target.
std::vector<brlite_draw> ways_to_draw() {
    static const int32_t ids[] = {2, 30, 31, 149}, counts[] = {0, 1, 3, 2};
    static const float biases[] = {1.5f, -2.0f, 30.0f, -100.0f};
    brlite_draw greedy = best_token();
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
    Batch(const Tokens& tokens, const Batches& all) : max_threads_(tokens.max_threads) {
        for (int i = 0; i < tokens.num_spans; i++) add_span(tokens.spans[i], all.blocks_of_sequence, block_tables_[i]);
        add_draws(all.draws_every_way);
    }

    // Adds all results to the checksum. Returns whether the batch was computed.
    bool run(brlite_engine* engine, Checksum& checksum) {
        const int32_t num_rows = (int32_t)token_ids_.size(), num_spans = (int32_t)spans_.size();
        const brlite_batch batch = {
            num_rows, num_spans, num_rows, max_threads_, token_ids_.data(), spans_.data(), draws_.data(), drawn_.data(),
            nullptr,  0,         0};
        if (brlite_run(engine, &batch)) return false;
        std::vector<int32_t> tokens;
        std::vector<float> logprobs;
        for (const brlite_drawn& drawn : drawn_) {
            tokens.push_back(drawn.token);
            logprobs.push_back(drawn.logprob);
        }
        checksum.add(logits_);
        checksum.add(tokens);
        checksum.add(logprobs);
        checksum.add(top_ids_);
        checksum.add(top_logprobs_);
        return true;
    }

 private:
    void add_span(const SomeTokens& tokens, int num_blocks, std::vector<int32_t>& block_table) {
        for (int block = 0; block < num_blocks; block++)  // blocks of a sequence are not adjacent
            block_table.push_back(block * Toy::NUM_SEQUENCES + tokens.sequence);
        spans_.push_back({tokens.start, (int32_t)token_ids_.size(), tokens.num_rows, 0, block_table.data()});
        for (int i = 0; i < tokens.num_rows; i++) token_ids_.push_back((tokens.start + 7 * i) % Toy::VOCABULARY);
    }

    void add_draws(bool every_way) {
        const std::vector<brlite_draw> ways = every_way ? ways_to_draw() : std::vector<brlite_draw>{best_token()};
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

    const int max_threads_;
    std::vector<int32_t> block_tables_[Toy::NUM_SEQUENCES], token_ids_, top_ids_;
    std::vector<float> top_logprobs_, logits_;
    std::vector<brlite_span> spans_;
    std::vector<brlite_draw> draws_;
    std::vector<brlite_drawn> drawn_;
};

// 0 if a batch was not computed.
uint64_t checksum_of(const Check& check, int isa) {
    Toy toy(check.weight_format, check.kv_format, check.has_int8_rows, check.batches.blocks_of_sequence);
    brlite_engine* engine = brlite_create(&toy.plan(), isa, check.num_threads);
    if (!engine) return 0;
    Checksum checksum;
    bool is_computed = true;
    for (const Tokens& tokens : check.batches.batches)
        if (tokens.num_spans) is_computed = is_computed && Batch(tokens, check.batches).run(engine, checksum);
    brlite_destroy(engine);
    checksum.add(toy.cache());
    return is_computed ? checksum.value() : 0;
}

}  // namespace

}  // namespace brlite

extern "C" {

uint64_t brlite_self_test(int32_t isa, int32_t check) {
    if (check < 0 || check >= brlite::NUM_CHECKS || !brlite::kernels_of(isa)) return 0;
    try {
        return brlite::checksum_of(brlite::CHECKS[check], isa);
    } catch (const std::bad_alloc&) {
        return 0;
    }
}

}  // extern "C"
