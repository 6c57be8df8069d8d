// One thread's part of a step. All threads go through the operations in order and divide the work of each. A barrier
// follows an operation whose result other threads read. With few rows each thread computes all activations itself,
// which saves barriers: five a layer are left. With many rows each thread has its own rows, and barriers are left only
// around the attention of spans that threads share.
#pragma once

#include "attention.h"
#include "linear.h"
#include "pool.h"
#include "sample.h"

namespace brlite {
namespace BRLITE_ISA {

struct Range {
    int first, end;
    Range times(int count) const { return {first * count, end * count}; }
};

struct Worker {
    const Step& step;
    Scratch scratch;
    Counter* counters;  // at 0 at the start; each division of work takes the next one
    Barrier& barrier;
    int num_counted = 0;
    Activations input{};                        // of the next LINEAR or ADD
    const brlite_operation* rope_op = nullptr;  // the ROPE that the next ATTEND runs itself
    Range rows{};                               // this thread's own, if the step divides rows

    Counter& next() { return *next(1); }
    Counter* next(int count) { return counters + (num_counted += count) - count; }

    // The first of this thread's own rows. If ATTEND runs ROPE itself, a span is one thread's.
    int first_row_of(int thread) const {
        const int row = (int)((long)step.batch->num_rows * thread / step.num_threads);
        const bool is_end = row == step.batch->num_rows;
        return step.joins_rope && !is_end ? step.batch->spans[step.row_spans[row]].first_row : row;
    }

    // Calls `work(unit)` for this thread's own units, else for units of [0, num_units) that the threads divide.
    template <class Work>
    void share(bool are_own, Range own, int num_units, Work work) {
        for (int unit = own.first; are_own && unit < own.end; unit++) work(unit);
        if (are_own) return;
        Counter& units = next();
        for (int unit = units.take(1); unit < num_units; unit = units.take(1)) work(unit);
    }

    void operate(const brlite_operation& op) {
        const int num_rows = step.batch->num_rows;
        switch (op.kind) {
            case BRLITE_LINEAR:
            case BRLITE_ADD:
                if (step.divides_rows)
                    return linear_of_rows({op, input, op.output, rows.first, rows.end, scratch.quads});
                if (op.squares && scratch.thread == 0) add_squares(op, input, num_rows);
                linear({op, input, op.output, 0, num_rows, scratch.quads}, next(step.num_threads), scratch.thread,
                       step.num_threads);
                if (op.is_part) return;
                break;
            case BRLITE_ROPE:
                if (step.joins_rope) return (void)(rope_op = &op);
                operate_rope(op, num_rows);
                break;
            case BRLITE_ATTEND:
                if (operate_attend(op)) return;
                break;
            default:
                if (make_rows(op, num_rows)) return;
        }
        meet(op.meets);
    }

    // Row operations. Returns true if this thread computed all rows that it reads, so that no barrier is needed.
    bool make_rows(const brlite_operation& op, int num_rows) {
        const bool is_own = op.kind != BRLITE_EMBED && op.kind != BRLITE_GATE && chooses_own(op, num_rows);
        share(is_own || step.divides_rows, step.divides_rows ? rows : Range{0, num_rows}, num_rows,
              [&](int row) INLINED { row_operation(step, op, scratch, input, row); });
        return is_own || step.divides_rows;
    }

    // Sets `input`: this thread's own memory if the rows are few, else the memory that threads share.
    bool chooses_own(const brlite_operation& op, int num_rows) {
        const int row_size = padded_inputs(op.num_inputs), block_rows = rows_of_block(num_rows);
        const bool is_own = step.num_threads > 1 && rounded_up(num_rows, block_rows) * row_size <= MAX_OWN_NUMBERS;
        input = is_own ? scratch.own : step.activations;
        if (is_own) input.row_size = row_size;
        input.block_rows = block_rows;
        input.shares_quads = shares_quads(num_rows);
        return is_own;
    }

    // Waits for all threads of this rank and, if `across`, for all ranks.
    void meet(bool across) {
        const brlite_plan& plan = *step.plan;
        barrier.wait([&] {
            if (across) ((Meeting*)plan.meeting)->wait(plan.num_ranks);
        });
    }

    void operate_rope(const brlite_operation& op, int num_rows) {
        const int num_heads = step.plan->attention.num_kv_heads;
        share(step.divides_rows, rows.times(num_heads), num_rows * num_heads,
              [&](int unit) INLINED { rope_head(step, op, unit / num_heads, unit % num_heads); });
    }

    // Returns true if this thread read and wrote its own rows only, so that no barrier is needed.
    bool operate_attend(const brlite_operation& op) {
        const int num_heads = step.plan->attention.num_kv_heads;
        const bool is_own = step.divides_rows && step.joins_rope;
        share(is_own, is_own ? own_items().times(num_heads) : Range{}, step.num_attention_items * num_heads,
              [&](int unit) {
                  attend_unit(step, op, step.joins_rope ? rope_op : nullptr, *(AttentionScratch*)scratch.attention,
                              unit);
              });
        if (!step.partial.is_split) return is_own;
        barrier.wait();
        share(false, {}, step.batch->num_rows, [&](int row) { merge_row(step, op, row); });
        return false;
    }

    // With one item a span, items are numbered as spans.
    Range own_items() const {
        if (rows.first == rows.end) return {};
        return {step.row_spans[rows.first], step.row_spans[rows.end - 1] + 1};
    }

    // Sums of hidden states. One thread computes a whole sum, since the order of float additions must be fixed.
    void pool() {
        const brlite_operation& norm = step.plan->norm;
        Counter& poolings = next();
        for (int i = poolings.take(1); i < step.batch->num_poolings; i = poolings.take(1)) {
            const brlite_pooling& pooling = step.batch->poolings[i];
            for (int row = pooling.first_row; row < pooling.first_row + pooling.num_rows; row++) {
                norm_row(norm, norm.input + (long)row * norm.row_size, scratch.row);
                for (int j = 0; j < norm.num_inputs; j++) pooling.total[j] += scratch.row[j];
            }
        }
    }

    // Computes logits for draws `first` to `first + 31`, and draws their tokens.
    void draw(int first) {
        const brlite_plan& plan = *step.plan;
        const brlite_batch& batch = *step.batch;
        const int num_rows = smaller(BRLITE_HEAD_ROWS, batch.num_draws - first);
        const bool is_own = chooses_own(plan.norm, num_rows);
        share(is_own, {0, num_rows}, num_rows, [&](int i) INLINED {
            const float* hidden = plan.norm.input + (long)batch.draws[first + i].row * plan.norm.row_size;
            norm_row(plan.norm, hidden, scratch.row);
            write_input(input, plan.norm, i, scratch.row, padded_inputs(plan.norm.num_inputs));
        });
        if (!is_own) barrier.wait();
        linear({plan.head, input, plan.head.output, 0, num_rows, scratch.quads}, next(step.num_threads), scratch.thread,
               step.num_threads);
        meet(plan.head.meets);
        Counter& draws = next();
        for (int i = draws.take(1); i < num_rows && plan.rank == 0; i = draws.take(1)) {
            float* logits = plan.logits + (long)i * plan.head.row_size;
            const brlite_draw& draw = batch.draws[first + i];
            if (draw.logits) memcpy(draw.logits, logits, plan.vocab_size * sizeof(float));
            draw_token(draw, logits, plan.vocab_size, batch.drawn[first + i], scratch);
        }
        // The next logits overwrite these.
        meet(plan.head.meets && first + BRLITE_HEAD_ROWS < batch.num_draws);
    }

    void run() {
        if (step.divides_rows) rows = {first_row_of(scratch.thread), first_row_of(scratch.thread + 1)};
        for (int i = 0; i < step.plan->num_operations; i++) operate(step.plan->body[i]);
        if (step.divides_rows) barrier.wait();
        if (step.batch->num_poolings) pool();
        for (int first = 0; first < step.batch->num_draws; first += BRLITE_HEAD_ROWS) draw(first);
    }
};

static void run(const Step& step, Scratch scratch, Counter* counters, Barrier& barrier) {
    Worker{step, scratch, counters, barrier}.run();
}

}  // namespace BRLITE_ISA
}  // namespace brlite
