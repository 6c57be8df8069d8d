// What engine.cpp calls of each instruction set.
#pragma once

#include <stddef.h>

#include "step.h"

namespace brlite {

class Barrier;

struct Kernels {
    void (*run)(const Step& step, Scratch scratch, Counter* counters, Barrier& barrier);
    void (*unpack_row)(int format, const void* panels, int row, int num_inputs, float* out);
    void (*draw_token)(const brlite_draw&, float* logits, int vocab_size, brlite_drawn&, const Scratch&);
    size_t attention_scratch_bytes;
    size_t sample_scratch_bytes;
    size_t row_bytes;  // of a bfloat16 activation: 2, or 4 where kernels take floats
};

// Null where this build lacks the instruction set. Whether the processor has it is another question.
const Kernels* generic_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_bf16_kernels();

}  // namespace brlite
