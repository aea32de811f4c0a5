// The kernels of one instruction set, and which set this machine runs.
#pragma once

#include "mtml/abi.h"
#include "plan.h"

namespace mtmlk {

struct Kernels {
  const char* name;
  int lanes_f32, lanes_f64;
  void (*inner_loop_f32)(const Plan&, const MtmlkCall&, void* workspace);
  void (*inner_loop_f64)(const Plan&, const MtmlkCall&, void* workspace);
  void (*carry_f32)(const Plan&, const void* carry, int64_t rows, const void* scale, int64_t stride, void* const* grads,
                    void* const* lr_grads, int threads);
  void (*carry_f64)(const Plan&, const void* carry, int64_t rows, const void* scale, int64_t stride, void* const* grads,
                    void* const* lr_grads, int threads);
  int64_t (*workspace_f32)(const Plan&, int64_t tasks, int threads, bool carry);  // bytes
  int64_t (*workspace_f64)(const Plan&, int64_t tasks, int threads, bool carry);
  double (*fma_peak)(int32_t dtype, int threads, double seconds);
  struct Head {
    int64_t (*loop_bytes)(const MtmlkHeadCall&);
    void (*loop)(const MtmlkHeadCall&, void* workspace);
    int64_t (*chain_bytes)(const MtmlkHeadCall&);
    void (*chain)(const MtmlkHeadCall&, void* workspace);
  } head_f32, head_f64;
};

extern const Kernels kBaseKernels;
#if defined(MTMLK_HAVE_AVX2)
extern const Kernels kAvx2Kernels;
#endif
#if defined(MTMLK_HAVE_AVX512)
extern const Kernels kAvx512Kernels;
#endif

bool isa_ok();             // false: MTML_CPU_ISA names a set that is not here; isa_reason() says so
const Kernels& kernels();  // chosen once: MTML_CPU_ISA, else the best the machine has
const char* isa_reason();
const char* isa_available();

int create_plan(const MtmlkPlanSpec& spec, int lanes, Plan** plan);
void destroy_plan(Plan* plan);

// A pool of large buffers: first-touch page faults cost 35 ms per 256 MB, so buffers are handed from call to call.
void* acquire_workspace(int64_t bytes);  // nullptr when memory is short
void release_workspace(void* buffer);

}  // namespace mtmlk
