// The kernels of one instruction set, and which set this machine runs.
#pragma once

#include "mtml/abi.h"
#include "inner_loop/plan/plan.h"
#include "runtime/watch.h"

namespace mtmlk {

// A part of one head's rows, or (elementwise kinds) of its rows' elements: cut by the head's own shape only.
struct HeadUnit {
  int64_t head, row0, row1, col0, col1;
  double norm, loss;  // sums over the unit: of what the rows count, and of their losses
  int64_t bad;        // the first row with a label out of range, or -1
};

// 1 / norm of a head. +0 says that nothing in it counts; an infinite norm, by which weights are 0 or NaN, gives -0.
static inline double inverse_norm(double norm) {
  return norm == 0 ? 0.0 : norm - norm == 0 || norm != norm ? 1 / norm : -0.0;
}

static inline bool counts_nothing(double inverse) { return inverse == 0 && !__builtin_signbit(inverse); }

struct HeadCall {
  const MtmlkHead* heads;
  HeadUnit* units;
  int64_t n_units;
  const double* inverse;  // [heads] 1 / norm; see counts_nothing
  int threads;
  Watch* watch;
};

// Rows [row0, row0 + rows) of linear heads; z [rows, ld] are their logits, and then the gradients at them.
struct LinearCall {
  const MtmlkLinear* linear;
  const int64_t* starts;  // [n_heads + 1] the heads' first columns in z
  int64_t ld, row0, rows;
  void* z;
  const double* by;  // [n_heads] cotangents
  void* dx;
  void *const *dw, *const *db;
  bool add;  // to what dw and db hold
  int threads;
  Watch* watch;
  void *shared, *scratch;
  int64_t thread_bytes;
};

struct Kernels {
  const char* name;
  int lanes_f32, lanes_f64;
  void (*inner_loop_f32)(const Plan&, const MtmlkCall&, void* workspace, Watch*);
  void (*inner_loop_f64)(const Plan&, const MtmlkCall&, void* workspace, Watch*);
  void (*carry_f32)(const Plan&, const void* carry, int64_t rows, const void* scale, int64_t stride, void* const* grads,
                    void* const* lr_grads, int threads);
  void (*carry_f64)(const Plan&, const void* carry, int64_t rows, const void* scale, int64_t stride, void* const* grads,
                    void* const* lr_grads, int threads);
  int64_t (*workspace_f32)(const Plan&, int64_t tasks, int threads, bool carry);  // bytes
  int64_t (*workspace_f64)(const Plan&, int64_t tasks, int threads, bool carry);
  double (*fma_peak)(int32_t dtype, int threads, double seconds);
  struct Head {
    int64_t (*loop_bytes)(const MtmlkHeadCall&);
    void (*loop)(const MtmlkHeadCall&, void* workspace, Watch*);
    int64_t (*chain_bytes)(const MtmlkHeadCall&);
    void (*chain)(const MtmlkHeadCall&, void* workspace, Watch*);
  } head_f32, head_f64;
  void (*head_norms_f32)(const HeadCall&);
  void (*head_norms_f64)(const HeadCall&);
  void (*head_losses_f32)(const HeadCall&, void* workspace, int64_t thread_bytes);
  void (*head_losses_f64)(const HeadCall&, void* workspace, int64_t thread_bytes);
  int64_t (*head_scratch_f32)(const MtmlkHead&);  // bytes a thread
  int64_t (*head_scratch_f64)(const MtmlkHead&);
  void (*linear_logits_f32)(const LinearCall&);
  void (*linear_logits_f64)(const LinearCall&);
  void (*linear_features_f32)(const LinearCall&);
  void (*linear_features_f64)(const LinearCall&);
  void (*linear_weights_f32)(const LinearCall&);
  void (*linear_weights_f64)(const LinearCall&);
  void (*linear_bytes_f32)(int64_t features, int64_t rows, int64_t* thread, int64_t* shared);
  void (*linear_bytes_f64)(int64_t features, int64_t rows, int64_t* thread, int64_t* shared);
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

int usable_threads(int threads);  // 1 in a forked child, which has none of its parent's threads

int create_plan(const MtmlkPlanSpec& spec, int lanes, Plan** plan, MtmlkReason* reason);
void destroy_plan(Plan* plan);
bool ids_ok(const Plan& plan, const MtmlkCall& call, MtmlkError* error);  // of embeddings; false: `error` says which

// A pool of large buffers: first-touch page faults cost 35 ms per 256 MB, so buffers are handed from call to call.
void* acquire_workspace(int64_t bytes, Watch* watch);  // nullptr when memory is short, or the call is stopped meanwhile
void release_workspace(void* buffer);

}  // namespace mtmlk
