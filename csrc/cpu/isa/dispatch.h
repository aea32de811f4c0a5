// The kernels of one instruction set, and which set this machine runs.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "runtime/crew.h"
#include "runtime/watch.h"
#include "inner_loop/plan/plan.h"
#include "multihead_loss/call.h"
#include "linear_multihead_loss/call.h"
#include "task_conv2d/call.h"

namespace mtmlk {

// Those of one dtype.
struct TypedKernels {
  int lanes;
  void (*inner_loop)(const Plan&, const MtmlkCall&, void* workspace, Watch*);
  void (*carry_to_grads)(const Plan&, const void* carry, int64_t rows, const void* scale, int64_t stride,
                         const CarryTargets&, int threads);
  int64_t (*workspace_bytes)(const Plan&, int64_t tasks, int threads, bool carry);

  int64_t (*head_loop_bytes)(const MtmlkHeadCall&);
  void (*head_loop)(const MtmlkHeadCall&, void* workspace, Watch*);
  int64_t (*head_chain_bytes)(const MtmlkHeadCall&);
  void (*head_chain)(const MtmlkHeadCall&, void* workspace, Watch*);

  void (*multihead_norms)(const MultiheadCall&);
  void (*multihead_losses)(const MultiheadCall&, void* workspace, int64_t thread_bytes);
  int64_t (*multihead_scratch)(const MtmlkHead&);  // bytes a thread

  void (*linear_logits)(const LinearMultiheadCall&);
  void (*linear_features)(const LinearMultiheadCall&);
  void (*linear_weights)(const LinearMultiheadCall&);
  void (*linear_bytes)(int64_t features, int64_t rows, int64_t* thread, int64_t* shared);
};

// The building blocks' of one dtype. `bytes`: of a thread; `sums`: of what the threads share.
struct TaskKernels {
  int lanes;
  int64_t (*linear_bytes)(const MtmlkTaskLinear&);
  void (*linear_forward)(const MtmlkTaskLinear&, const Crew&);
  void (*linear_backward)(const MtmlkTaskLinear&, void* slopes, const Crew&);
  int64_t (*conv2d_bytes)(const MtmlkTaskConv2d&);
  int64_t (*conv2d_sums)(const MtmlkTaskConv2d&);
  void (*conv2d_forward)(const TaskConvCall&, const Crew&);
  void (*conv2d_backward)(const TaskConvCall&, void* sums, const Crew&);
  void (*update_forward)(const MtmlkTaskUpdate&, const Crew&);
  void (*update_backward)(const MtmlkTaskUpdate&, const Crew&);
};

struct Kernels {
  const char* name;
  TypedKernels f32, f64;
  double (*fma_peak)(int32_t dtype, int threads, double seconds);
};

extern const Kernels kBaseKernels;
extern const TaskKernels kBaseTaskKernels[2];  // float32, float64
#if defined(MTMLK_HAVE_AVX2)
extern const Kernels kAvx2Kernels;
extern const TaskKernels kAvx2TaskKernels[2];
#endif
#if defined(MTMLK_HAVE_AVX512)
extern const Kernels kAvx512Kernels;
extern const TaskKernels kAvx512TaskKernels[2];
#endif

bool isa_ok();             // false: MTML_CPU_ISA names a set that is not here; isa_reason() says so
const Kernels& kernels();  // chosen once: MTML_CPU_ISA, else the best the machine has
const TypedKernels& kernels_of(int32_t dtype);
const TaskKernels& task_kernels_of(int32_t dtype);
const char* isa_reason();
const char* isa_available();

}  // namespace mtmlk
