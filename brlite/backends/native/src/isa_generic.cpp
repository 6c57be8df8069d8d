// The kernels in portable C++, for every processor. The self-test compares the other kernels with these.
#define BRLITE_ISA generic
#include "isa.h"
#include "isa_end.h"
