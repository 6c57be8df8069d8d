// Finds the kernels that both this build and this processor have.
#pragma once

#include "kernels.h"

namespace brlite {

// The kernels for an instruction set; null if the build or the processor lacks it.
const Kernels* kernels_of(int isa);

}  // namespace brlite
