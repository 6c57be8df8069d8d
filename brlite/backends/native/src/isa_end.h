// Included last by each isa_*.cpp: its table of kernels.
#include "run.h"

#define BRLITE_JOIN(a, b) a##b
#define BRLITE_KERNELS(isa) BRLITE_JOIN(isa, _kernels)

namespace brlite {

const Kernels* BRLITE_KERNELS(BRLITE_ISA)() {
    static const Kernels kernels = {BRLITE_ISA::run,
                                    BRLITE_ISA::unpack_row,
                                    BRLITE_ISA::draw_token,
                                    sizeof(BRLITE_ISA::AttentionScratch),
                                    sizeof(BRLITE_ISA::SampleScratch),
                                    sizeof(BRLITE_ISA::Bf16::Row)};
    return &kernels;
}

}  // namespace brlite
