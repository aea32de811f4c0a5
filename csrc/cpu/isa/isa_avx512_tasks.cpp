#define MTMLK_ISA_AVX512
#define MTMLK_TASK_KERNELS kAvx512TaskKernels
#include "isa/tasks_body.h"
