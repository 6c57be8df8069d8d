// The kernels in plain C++: what every processor can do, and what the others are checked against.
#define BRLITE_ISA generic
#include "isa.h"
#include "isa_end.h"
