#define MTMLK_ISA_AVX512
#define MTMLK_ISA_NAME "avx512"
#define MTMLK_KERNELS kAvx512Kernels
#include "isa/isa_body.h"
