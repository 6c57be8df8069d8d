// Runs plans: checks a batch, maps its rows to positions and spans, divides attention into work items, runs the
// threads.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "brlite.h"
#include "isas.h"
#include "kernels.h"
#include "memory.h"
#include "pause.h"
#include "pool.h"
#include "step.h"

namespace brlite {

namespace {

constexpr int MAX_SPLIT_ROWS = 8;  // steps with more rows keep all threads busy without splitting sequences

int widest(const brlite_plan& plan) {
    int width = std::max(padded_inputs(plan.head.num_inputs), padded_inputs(plan.norm.num_inputs));
    for (int i = 0; i < plan.num_operations; i++) width = std::max(width, padded_inputs(plan.body[i].num_inputs));
    return width;
}

enum BatchError {
    NONE,
    TOO_MANY_ROWS,
    WRONG_SPAN,
    WRONG_POSITION,
    WRONG_BLOCK,
    WRONG_TOKEN,
    WRONG_DRAW,
    NO_MEMORY,
    LOST_RANK,
};

BatchError check_span(const brlite_plan& plan, const brlite_span& span, int first_row) {
    const brlite_attention& a = plan.attention;
    if (span.first_row != first_row || span.num_rows < 1) return WRONG_SPAN;
    if (span.start < 0 || span.start > a.max_positions - span.num_rows) return WRONG_POSITION;
    const int num_pages = (span.start + span.num_rows - 1) / BRLITE_LANES + 1;
    for (int block = 0; block < rounded(num_pages, a.pages_per_block) / a.pages_per_block; block++)
        if (span.block_table[block] < 0 || span.block_table[block] >= plan.max_blocks) return WRONG_BLOCK;
    return NONE;
}

bool are_tokens(const brlite_plan& plan, const int32_t* token_ids, int num_ids) {
    return std::all_of(token_ids, token_ids + num_ids, [&plan](int32_t id) { return id >= 0 && id < plan.vocab_size; });
}

BatchError check_draw(const brlite_plan& plan, const brlite_draw& draw, int num_rows) {
    if (draw.row < 0 || draw.row >= num_rows || draw.target >= plan.vocab_size) return WRONG_DRAW;
    const bool is_sound =
        are_tokens(plan, draw.bias_ids, draw.num_biases) && are_tokens(plan, draw.banned_ids, draw.num_banned) &&
        are_tokens(plan, draw.counted_ids, draw.num_counted) && are_tokens(plan, draw.cost_ids, draw.num_costs);
    return is_sound ? NONE : WRONG_TOKEN;
}

bool is_within(const brlite_pooling& pooling, int num_rows) {
    return pooling.first_row >= 0 && pooling.num_rows >= 1 && pooling.first_row <= num_rows - pooling.num_rows;
}

BatchError check(const brlite_plan& plan, const brlite_batch& batch) {
    if (batch.num_rows < 1 || batch.num_rows > plan.max_rows) return TOO_MANY_ROWS;
    int num_rows = 0;
    for (int i = 0; i < batch.num_spans; i++) {
        if (const BatchError error = check_span(plan, batch.spans[i], num_rows)) return error;
        num_rows += batch.spans[i].num_rows;
    }
    if (num_rows != batch.num_rows) return WRONG_SPAN;
    for (int row = 0; row < num_rows; row++)
        if (batch.token_ids[row] < 0 || batch.token_ids[row] >= plan.vocab_size) return WRONG_TOKEN;
    for (int i = 0; i < batch.num_draws; i++)
        if (const BatchError error = check_draw(plan, batch.draws[i], num_rows)) return error;
    for (int i = 0; i < batch.num_poolings; i++)
        if (!is_within(batch.poolings[i], num_rows)) return WRONG_SPAN;
    return NONE;
}

}  // namespace

class Engine {
 public:
    Engine(const brlite_plan& plan, const Kernels& kernels, int num_threads)
        : plan_(plan), body_(plan.body, plan.body + plan.num_operations), kernels_(kernels), pool_(num_threads) {
        plan_.body = body_.data();
        has_squares_ = std::any_of(body_.begin(), body_.end(), [](const auto& op) { return op.squares != nullptr; });
        allocate(num_threads);
    }

    BatchError run(const brlite_batch& batch) {
        if (const BatchError error = check(plan_, batch)) return error;
        step_.num_threads =
            batch.num_threads > 0 ? std::min(batch.num_threads, pool_.num_threads()) : pool_.num_threads();
        lay_out(batch);
        const int num_slices = rounded(batch.num_draws, BRLITE_HEAD_ROWS) / BRLITE_HEAD_ROWS;
        if (needed_counters(num_slices) > num_counters_) grow_counters(num_slices);
        for (size_t i = 0; i < num_counters_; i++) counters_[i].value.store(0, std::memory_order_relaxed);
        const auto compute = [this](int thread) {
            FlushToZero mode;
            kernels_.run(step_, scratch_[thread], counters_.get(), pool_.barrier());
        };
        last_time_ = pool_.run(compute, step_.num_threads);
        return plan_.meeting && ((Meeting*)plan_.meeting)->has_ended() ? LOST_RANK : NONE;
    }

    const JobTime& last_time() const { return last_time_; }

 private:
    void allocate(int num_threads);
    // A matrix takes one for each thread, other operations up to two; then one for the poolings, and for each slice of
    // 32 draws those of a matrix and two more.
    size_t needed_counters(int num_slices) const {
        const size_t most = std::max(2, pool_.num_threads());
        return most * body_.size() + 1 + (most + 2) * num_slices;
    }
    void grow_counters(int num_slices);
    void lay_out(const brlite_batch& batch);
    void share_out(const brlite_batch& batch);
    void split(const brlite_batch& batch);
    int last_chunk(const brlite_span& span) const { return (span.start + span.num_rows - 1) / CHUNK; }

    brlite_plan plan_;
    bool has_squares_;  // then one thread needs all rows of activations
    const std::vector<brlite_operation> body_;
    const Kernels& kernels_;
    Pool pool_;
    Step step_{};
    JobTime last_time_{};
    std::vector<Memory> memories_;
    std::vector<Scratch> scratch_;
    std::vector<int32_t> positions_, row_spans_;
    std::vector<AttentionItem> attention_items_;
    std::unique_ptr<Counter[]> counters_;
    size_t num_counters_ = 0;
};

void Engine::allocate(int num_threads) {
    const brlite_attention& a = plan_.attention;
    const size_t element = std::max(sizeof(int16_t), kernels_.row_bytes), width = widest(plan_);
    const size_t max_rows = std::max(plan_.max_rows, BRLITE_HEAD_ROWS), num_queries = max_rows * a.num_heads;
    const auto take = [this](size_t num_bytes) { return memories_.emplace_back(num_bytes).data(); };

    step_.plan = &plan_;
    step_.num_threads = num_threads;
    const size_t max_numbers = (max_rows + MAX_BLOCK_ROWS) * width;
    step_.activations = {take(max_numbers * element),
                         (float*)take(max_rows * sizeof(float)),
                         (long)width,
                         (ActivationGroup*)take(max_numbers / BRLITE_GROUP * sizeof(ActivationGroup)),
                         0,
                         false};
    step_.queries = {take(num_queries * head_size(a) * element),
                     (float*)take(num_queries * sizeof(float)),
                     head_size(a),
                     nullptr,
                     0,
                     false};
    const int max_chunks = (a.max_positions + CHUNK - 1) / CHUNK;
    const size_t num_partials = (size_t)MAX_SPLIT_ROWS * a.num_heads * max_chunks;
    step_.partial = {(float*)take(num_partials * head_size(a) * sizeof(float)),
                     (float*)take(num_partials * sizeof(float)), (float*)take(num_partials * sizeof(float)), max_chunks,
                     false};
    const size_t own_numbers = MAX_OWN_NUMBERS + MAX_BLOCK_ROWS * BRLITE_GROUP;  // a tile can be larger than its block
    for (int thread = 0; thread < num_threads; thread++)
        scratch_.push_back({thread,
                            (float*)take(width * sizeof(float)),
                            {take(own_numbers * element), (float*)take(own_numbers / BRLITE_GROUP * sizeof(float)), 0,
                             (ActivationGroup*)take(own_numbers / BRLITE_GROUP * sizeof(ActivationGroup)), 0, false},
                            take(MAX_TILE_PANELS * width * BRLITE_LANES),
                            take(kernels_.attention_scratch_bytes),
                            take(kernels_.sample_scratch_bytes),
                            (float*)take(plan_.vocab_size * sizeof(float))});
    positions_.resize(max_rows);
    row_spans_.resize(max_rows);
    grow_counters(1);
}

void Engine::grow_counters(int num_slices) {
    counters_.reset(new Counter[needed_counters(num_slices)]);
    num_counters_ = needed_counters(num_slices);
}

void Engine::lay_out(const brlite_batch& batch) {
    for (int i = 0; i < batch.num_spans; i++) {
        const brlite_span& span = batch.spans[i];
        for (int token = 0; token < span.num_rows; token++) {
            positions_[span.first_row + token] = span.start + token;
            row_spans_[span.first_row + token] = i;
        }
    }
    step_.batch = &batch;
    step_.positions = positions_.data();
    step_.row_spans = row_spans_.data();
    share_out(batch);
}

// Divides attention into work items: as many tokens as fit a tile. If these are too few for all threads, each is split
// into the chunks of its sequence.
void Engine::share_out(const brlite_batch& batch) {
    const brlite_attention& a = plan_.attention;
    const int max_tokens = std::max(1, TILE_ROWS / (a.num_heads / a.num_kv_heads));
    attention_items_.clear();
    int longest = 0;
    for (int i = 0; i < batch.num_spans; i++) {
        const int num_rows = batch.spans[i].num_rows, num_tiles = (num_rows + max_tokens - 1) / max_tokens;
        for (int t = num_tiles - 1; t >= 0; t--) {  // the last tokens first: they see most and take longest
            const int first = (int)((long)num_rows * t / num_tiles);
            attention_items_.push_back({i, first, (int)((long)num_rows * (t + 1) / num_tiles) - first, -1});
        }
        longest = std::max(longest, last_chunk(batch.spans[i]));
    }
    const bool has_few = (int)attention_items_.size() * a.num_kv_heads < 4 * step_.num_threads;
    step_.partial.is_split = has_few && longest > 0 && batch.num_rows <= MAX_SPLIT_ROWS;
    // With one item a span, only that item reads the blocks that the span writes: a block is shared with other
    // sequences only after the step. So the item can run ROPE itself, without a barrier in between.
    step_.joins_rope = !step_.partial.is_split && (int)attention_items_.size() == batch.num_spans;
    if (step_.partial.is_split) split(batch);
    step_.divides_rows = !plan_.meeting && !has_squares_ && step_.num_threads > 1 &&
                         batch.num_rows >= min_divided_rows(step_.num_threads);
    step_.attention_items = attention_items_.data();
    step_.num_attention_items = (int)attention_items_.size();
}

void Engine::split(const brlite_batch& batch) {
    std::vector<AttentionItem> whole;
    whole.swap(attention_items_);
    for (const AttentionItem& item : whole)
        for (int chunk = 0; chunk <= last_chunk(batch.spans[item.span]); chunk++)
            attention_items_.push_back({item.span, item.first_token, item.num_tokens, chunk});
}

}  // namespace brlite

struct brlite_engine : brlite::Engine {
    using brlite::Engine::Engine;
};

extern "C" {

brlite_engine* brlite_create(const brlite_plan* plan, int32_t isa, int32_t num_threads) {
    const brlite::Kernels* kernels = brlite::kernels_of(isa);
    if (!kernels || num_threads < 1) return nullptr;
    try {
        return new brlite_engine(*plan, *kernels, num_threads);
    } catch (const std::exception&) {  // no memory, or the system gives no more threads
        return nullptr;
    }
}

void brlite_destroy(brlite_engine* engine) { delete engine; }

void brlite_last_time(const brlite_engine* engine, double* seconds) {
    seconds[0] = engine->last_time().seconds;
    seconds[1] = engine->last_time().busy_seconds;
}

int32_t brlite_run(brlite_engine* engine, const brlite_batch* batch) {
    try {
        return engine->run(*batch);
    } catch (const std::bad_alloc&) {
        return brlite::NO_MEMORY;
    }
}

}  // extern "C"
