#define MTMLK_ISA_BASE
#define MTMLK_TASK_KERNELS kBaseTaskKernels
#include "isa/tasks_body.h"
