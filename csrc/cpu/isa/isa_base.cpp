#define MTMLK_ISA_BASE
#define MTMLK_ISA_NAME "base"
#define MTMLK_KERNELS kBaseKernels
#include "isa/isa_body.h"
