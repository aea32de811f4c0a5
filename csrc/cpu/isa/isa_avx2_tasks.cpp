#define MTMLK_ISA_AVX2
#define MTMLK_TASK_KERNELS kAvx2TaskKernels
#include "isa/tasks_body.h"
