// One thread's part of a step. All threads go through the operations in order and divide the work of each. A barrier
// follows an operation whose result other threads read. With few rows each thread computes all activations itself,
// which saves barriers: five a layer are left.
#pragma once

#include "attention.h"
#include "linear.h"
#include "pool.h"
#include "sample.h"

namespace brlite {
namespace BRLITE_ISA {

struct Worker {
    const Step& step;
    Scratch scratch;
    Counter* counters;  // at 0 at the start; each division of work takes the next one
    Barrier& barrier;
    int num_counted = 0;
    const Activations* input = nullptr;         // of the next LINEAR or ADD
    const brlite_operation* rope_op = nullptr;  // the ROPE that the next ATTEND runs itself

    Counter& next() { return counters[num_counted++]; }

    void operate(const brlite_operation& op) {
        const int num_rows = step.batch->num_rows;
        switch (op.kind) {
            case BRLITE_LINEAR:
            case BRLITE_ADD:
                linear({op, *input, op.output, num_rows}, next(), step.num_threads);
                if (op.is_part) return;
                break;
            case BRLITE_ROPE:
                if (step.joins_rope) return (void)(rope_op = &op);
                rope(step, op, next(), num_rows);
                break;
            case BRLITE_ATTEND:
                operate_attend(op);
                break;
            default:
                if (make_rows(op, num_rows)) return;
        }
        meet(op.meets);
    }

    // Row operations. Returns true if this thread computed all rows itself, so that no barrier is needed.
    bool make_rows(const brlite_operation& op, int num_rows) {
        const bool is_own = op.kind != BRLITE_EMBED && op.kind != BRLITE_GATE && chooses_own(op, num_rows);
        share_rows(is_own, num_rows, [&](int row) INLINED { row_operation(step, op, scratch, *input, row); });
        return is_own;
    }

    // Sets `input`: this thread's own memory if the rows are few, else the memory that threads share.
    bool chooses_own(const brlite_operation& op, int num_rows) {
        scratch.own.row_size = padded_inputs(op.num_inputs);
        const bool is_own = step.num_threads > 1 && num_rows * scratch.own.row_size <= MAX_OWN_NUMBERS;
        input = is_own ? &scratch.own : &step.activations;
        return is_own;
    }

    // Calls `make(row)` for every row if `is_own`, as `chooses_own` returned it. Else all threads divide the rows.
    template <class Make>
    void share_rows(bool is_own, int num_rows, Make make) {
        for (int row = 0; is_own && row < num_rows; row++) make(row);
        if (is_own) return;
        Counter& rows = next();
        for (int row = rows.take(1); row < num_rows; row = rows.take(1)) make(row);
    }

    // Waits for all threads of this rank and, if `across`, for all ranks.
    void meet(bool across) {
        const brlite_plan& plan = *step.plan;
        barrier.wait([&] {
            if (across) ((Meeting*)plan.meeting)->wait(plan.num_ranks);
        });
    }

    void operate_attend(const brlite_operation& op) {
        attend(step, op, step.joins_rope ? rope_op : nullptr, *(AttentionScratch*)scratch.attention, next());
        if (!step.partial.is_split) return;
        barrier.wait();
        Counter& rows = next();
        for (int row = rows.take(1); row < step.batch->num_rows; row = rows.take(1)) merge_row(step, op, row);
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
        share_rows(is_own, num_rows, [&](int i) INLINED {
            const float* hidden = plan.norm.input + (long)batch.draws[first + i].row * plan.norm.row_size;
            norm_row(plan.norm, hidden, scratch.row);
            write_input(*input, plan.norm, i, scratch.row, padded_inputs(plan.norm.num_inputs));
        });
        if (!is_own) barrier.wait();
        linear({plan.head, *input, plan.head.output, num_rows}, next(), step.num_threads);
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
        for (int i = 0; i < step.plan->num_operations; i++) operate(step.plan->body[i]);
        if (step.batch->num_poolings) pool();
        for (int first = 0; first < step.batch->num_draws; first += BRLITE_HEAD_ROWS) draw(first);
    }
};

static void run(const Step& step, Scratch scratch, Counter* counters, Barrier& barrier) {
    Worker{step, scratch, counters, barrier}.run();
}

}  // namespace BRLITE_ISA
}  // namespace brlite
