// Draws tokens without a step: for tests, and for logits that torch computed. Also waits for grammar masks.
#include <string.h>

#include <chrono>
#include <new>
#include <thread>

#include "brlite.h"
#include "isas.h"
#include "kernels.h"
#include "memory.h"
#include "pause.h"

namespace brlite {

constexpr int NUM_SPINS = 2000;
constexpr std::chrono::microseconds NAP(20);  // the thread that fills the mask may need this core
constexpr std::chrono::seconds MAX_WAIT(60);

bool wait_for_mask(const brlite_draw& draw) {
    const auto is_filled = [&draw] {
        return !draw.is_mask_filled || __atomic_load_n(draw.is_mask_filled, __ATOMIC_ACQUIRE);
    };
    for (int i = 0; i < NUM_SPINS; i++) {
        if (is_filled()) return true;
        pause();
    }
    const auto deadline = std::chrono::steady_clock::now() + MAX_WAIT;
    while (!is_filled()) {
        if (std::chrono::steady_clock::now() > deadline) return false;
        std::this_thread::sleep_for(NAP);
    }
    return true;
}

}  // namespace brlite

extern "C" {

int32_t brlite_draw_rows(int32_t isa, const brlite_draw* draws, brlite_drawn* drawn, int32_t num_rows,
                         int32_t vocab_size, const float* logits) {
    const brlite::Kernels* kernels = brlite::kernels_of(isa);
    if (!kernels) return -1;
    try {
        brlite::FlushToZero mode;
        const size_t row_bytes = vocab_size * sizeof(float);
        brlite::Memory sample(kernels->sample_scratch_bytes), own_logits(row_bytes), row_of_lanes(row_bytes + 64);
        brlite::Scratch scratch{};
        scratch.sample = sample.data();
        scratch.own_logits = (float*)own_logits.data();
        float* const edited = (float*)row_of_lanes.data();
        for (int row = 0; row < num_rows; row++) {
            memcpy(edited, logits + (size_t)row * vocab_size, row_bytes);
            kernels->draw_token(draws[row], edited, vocab_size, drawn[row], scratch);
        }
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

}  // extern "C"
