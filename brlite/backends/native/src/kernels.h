// The functions that each instruction set provides; engine.cpp, pack.cpp and draw.cpp call them.
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
    size_t row_bytes;  // bytes of a bfloat16 activation: 2, or 4 where the kernels take floats
};

// Null if this build lacks the instruction set. These do not check the processor; `kernels_of` does.
const Kernels* generic_kernels();
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* neon_kernels();
const Kernels* neon_dotprod_kernels();
const Kernels* neon_i8mm_kernels();

}  // namespace brlite
