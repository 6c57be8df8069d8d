// How a token is drawn from a row of logits.
#pragma once

#include "rows.h"

namespace brlite {
namespace BRLITE_ISA {

static void draw_token(const brlite_draw&, float* logits, int vocab_size, brlite_drawn& drawn) {
    int best = 0;
    for (int i = 1; i < vocab_size; i++)
        if (logits[i] > logits[best]) best = i;
    drawn.token = is_finite(logits[best]) ? best : -1;
}

}  // namespace BRLITE_ISA
}  // namespace brlite
