// Prints the results of the self-test's toy model, for every precision, with
// every instruction set of the library that it is linked with, or with any
// argument only with the best one of this processor: tokens, and checksums of
// the logits and of the cache. Built for two processors, and the lines
// compared (test_arm.py).
#include <stdio.h>

#include "brlite.h"
#include "toy.h"

using brlite::Toy;

namespace {

constexpr int MAX_TOKENS = 20, PROMPT = 14, NUM_BLOCKS = 1;

// Computes tokens `first` .. `end - 1` of the first sequence. Each row draws
// its next token.
bool step(brlite_engine* engine, int32_t* tokens, int first, int end, uint64_t& checksum) {
    static float logits[MAX_TOKENS][Toy::VOCABULARY];
    int32_t blocks[NUM_BLOCKS];
    for (int i = 0; i < NUM_BLOCKS; i++) blocks[i] = i * Toy::NUM_SEQUENCES;
    const brlite_span span = {first, 0, end - first, 0, blocks};
    brlite_draw draws[MAX_TOKENS] = {};
    brlite_drawn drawn[MAX_TOKENS] = {};
    for (int row = 0; row < end - first; row++) {
        draws[row].row = row;
        draws[row].target = -1;
        draws[row].temperature = row + first < PROMPT + 2 ? 0.0f : 0.9f;
        draws[row].top_k = Toy::VOCABULARY;
        draws[row].top_p = draws[row].typical_p = 1.0;
        draws[row].repetition_penalty = 1.0f;
        draws[row].uniform = 0.37;
        draws[row].num_logprobs = -1;
        draws[row].logits = logits[row];
    }
    const brlite_batch batch = {end - first, 1, end - first, 0, tokens + first, &span, draws, drawn, nullptr, 0, 0};
    if (brlite_run(engine, &batch)) return false;
    checksum = 31 * checksum + brlite_checksum(nullptr, logits, (size_t)(end - first) * sizeof *logits);
    tokens[end] = drawn[end - first - 1].token;
    return true;
}

// A prompt, computed as two chunks, and a few tokens after it, one at a time.
bool print_results(int isa, int weight_format, int kv_format, bool has_int8_rows) {
    Toy toy(weight_format, kv_format, has_int8_rows, NUM_BLOCKS);
    brlite_engine* engine = brlite_create(&toy.plan(), isa, 2);
    int32_t tokens[MAX_TOKENS + 1];
    for (int i = 0; i < PROMPT; i++) tokens[i] = 11 * i % Toy::VOCABULARY;
    uint64_t checksum = 0;
    bool is_computed = engine && step(engine, tokens, 0, 5, checksum);
    tokens[5] = 55;
    is_computed = is_computed && step(engine, tokens, 5, PROMPT, checksum);
    for (int i = PROMPT; is_computed && i < MAX_TOKENS; i++) is_computed = step(engine, tokens, i, i + 1, checksum);
    brlite_destroy(engine);
    const uint64_t cache = brlite_checksum(nullptr, toy.cache().data(), toy.cache().size());
    printf("isa %d weights %d cache %d int8 rows %d: %016llx %016llx", isa, weight_format, kv_format, has_int8_rows,
           (unsigned long long)checksum, (unsigned long long)cache);
    for (int i = PROMPT; i <= MAX_TOKENS; i++) printf(" %d", tokens[i]);
    printf("\n");
    return is_computed;
}

}  // namespace

int main(int argc, char**) {
    bool is_computed = true;
    int best = BRLITE_NUM_ISAS - 1;
    while (!brlite_isa_available(best)) best--;
    for (int isa = argc > 1 ? best : 0; isa <= best; isa++) {
        if (!brlite_isa_available(isa)) continue;
        for (int weight_format = 0; weight_format < BRLITE_NUM_FORMATS; weight_format++) {
            is_computed &= print_results(isa, weight_format, BRLITE_INT8, false);
            is_computed &= print_results(isa, weight_format, BRLITE_BF16, false);
            if (weight_format != BRLITE_BF16) is_computed &= print_results(isa, weight_format, BRLITE_BF16, true);
        }
    }
    return is_computed ? 0 : 1;
}
