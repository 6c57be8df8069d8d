// One thread's way through a plan: every operation in turn, all threads on each, a barrier after it.
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
    Counter* counters;  // one for each operation of the run, all at 0
    Barrier& barrier;
    int num_counted = 0;

    Counter& next() { return counters[num_counted++]; }

    void operate(const brlite_operation& op) {
        const int num_rows = step.batch->num_rows;
        switch (op.kind) {
            case BRLITE_LINEAR:
            case BRLITE_ADD:
                linear({op, step.activations, op.output, num_rows}, next(), step.num_threads);
                break;
            case BRLITE_ROPE:
                rope(step, op, next(), num_rows);
                break;
            case BRLITE_ATTEND:
                operate_attend(op);
                break;
            default:
                row_operation(step, op, scratch, next(), num_rows);
        }
        meet(op.meets);
    }

    // All threads, and where `across` all ranks too.
    void meet(bool across) {
        const brlite_plan& plan = *step.plan;
        barrier.wait([&] {
            if (across) ((Meeting*)plan.meeting)->wait(plan.num_ranks);
        });
    }

    void operate_attend(const brlite_operation& op) {
        attend(step, op, *(AttentionScratch*)scratch.attention, next());
        if (!step.partial.is_split) return;
        barrier.wait();
        Counter& rows = next();
        for (int row = rows.take(1); row < step.batch->num_rows; row = rows.take(1)) merge_row(step, op, row);
    }

    // Logits of the drawing rows `first` onwards, and what is drawn from them.
    void draw(int first) {
        const brlite_plan& plan = *step.plan;
        const brlite_batch& batch = *step.batch;
        const int num_rows = smaller(BRLITE_HEAD_ROWS, batch.num_draws - first);
        Counter& rows = next();
        for (int i = rows.take(1); i < num_rows; i = rows.take(1)) {
            const float* hidden = plan.norm.input + (long)batch.draws[first + i].row * plan.norm.row_size;
            norm_row(plan.norm, hidden, scratch.row);
            write_row(step.activations, plan.norm.format, i, scratch.row, padded_inputs(plan.norm.num_inputs));
        }
        barrier.wait();
        linear({plan.head, step.activations, plan.head.output, num_rows}, next(), step.num_threads);
        meet(plan.head.meets);
        Counter& draws = next();
        for (int i = draws.take(1); i < num_rows && plan.rank == 0; i = draws.take(1)) {
            float* logits = plan.logits + (long)i * plan.head.row_size;
            if (batch.logits)
                memcpy(batch.logits + (long)(first + i) * plan.vocab_size, logits, plan.vocab_size * sizeof(float));
            draw_token(batch.draws[first + i], logits, plan.vocab_size, batch.drawn[first + i], scratch);
        }
        // The next rows' logits take the place of these.
        meet(plan.head.meets && first + BRLITE_HEAD_ROWS < batch.num_draws);
    }

    void run() {
        for (int i = 0; i < step.plan->num_operations; i++) operate(step.plan->body[i]);
        for (int first = 0; first < step.batch->num_draws; first += BRLITE_HEAD_ROWS) draw(first);
    }
};

static void run(const Step& step, Scratch scratch, Counter* counters, Barrier& barrier) {
    Worker{step, scratch, counters, barrier}.run();
}

}  // namespace BRLITE_ISA
}  // namespace brlite
