// Which kernels a build and a processor have.
#pragma once

#include "kernels.h"

namespace brlite {

// The kernels of an instruction set; null where the build or the processor lacks it.
const Kernels* kernels_of(int isa);

}  // namespace brlite
