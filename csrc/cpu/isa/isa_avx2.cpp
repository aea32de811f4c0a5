#define MTMLK_ISA_AVX2
#define MTMLK_ISA_NAME "avx2"
#define MTMLK_KERNELS kAvx2Kernels
#include "isa/isa_body.h"
