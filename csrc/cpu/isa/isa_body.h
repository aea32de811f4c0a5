// The engine, compiled once per instruction set: isa_*.cpp defines MTMLK_ISA_* and MTMLK_KERNELS and includes this
// file. Everything is inside an anonymous namespace: a weak symbol could make the linker choose one set's code for
// another.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <omp.h>
#include <stdint.h>
#include <time.h>

#include "isa/dispatch.h"
#include "inner_loop/plan/plan.h"

namespace mtmlk {
namespace {

#include "simd/simd.h"
#include "runtime/stops.h"
#include "simd/vmath.h"
#include "simd/gemm.h"
#include "simd/dots.h"
#include "simd/layout.h"
#include "layers/pointwise.h"
#include "inner_loop/loss.h"
#include "layers/block.h"
#include "inner_loop/low_rank.h"
#include "inner_loop/low_rank_sum.h"
#include "layers/linear.h"
#include "layers/elementwise.h"
#include "layers/embedding.h"
#include "layers/conv/products.h"
#include "layers/conv/pairs.h"
#include "layers/conv/layer.h"
#include "layers/conv/group.h"
#include "layers/norm/stats.h"
#include "layers/norm/sums.h"
#include "layers/norm/batch_group.h"
#include "layers/norm/stream.h"
#include "layers/norm/passes.h"
#include "layers/norm/layer.h"
#include "layers/pool.h"
#include "layers/table.h"
#include "inner_loop/task.h"
#include "inner_loop/passes.h"
#include "inner_loop/reverse.h"
#include "inner_loop/driver.h"
#include "head_inner_loop/loss.h"
#include "head_inner_loop/features.h"
#include "head_inner_loop/task.h"
#include "head_inner_loop/reverse.h"
#include "head_inner_loop/chain.h"
#include "head_inner_loop/driver.h"
#include "isa/fma_peak.h"
#include "multihead_loss/math.h"
#include "multihead_loss/softmax_tiles.h"
#include "multihead_loss/softmax_rows.h"
#include "multihead_loss/elements.h"
#include "multihead_loss/kernel.h"
#include "linear_multihead_loss/kernel.h"

// Builds under sanitizers (tests/fuzz) instantiate one type only: half the compilation.
#if !defined(MTMLK_SINGLE)
#define MTMLK_SINGLE float
#endif

}  // namespace

const Kernels MTMLK_KERNELS = {
    MTMLK_ISA_NAME,
    Simd<MTMLK_SINGLE>::kLanes,
    Simd<double>::kLanes,
    run_inner_loop<MTMLK_SINGLE>,
    run_inner_loop<double>,
    carry_to_grads<MTMLK_SINGLE>,
    carry_to_grads<double>,
    workspace_bytes<MTMLK_SINGLE>,
    workspace_bytes<double>,
    measure_fma_peak,
    {head_loop_bytes<MTMLK_SINGLE>, run_head_loop<MTMLK_SINGLE>, head_chain_bytes<MTMLK_SINGLE>,
     run_head_chain<MTMLK_SINGLE>},
    {head_loop_bytes<double>, run_head_loop<double>, head_chain_bytes<double>, run_head_chain<double>},
    head_norms<MTMLK_SINGLE>,
    head_norms<double>,
    head_losses<MTMLK_SINGLE>,
    head_losses<double>,
    head_scratch<MTMLK_SINGLE>,
    head_scratch<double>,
    linear_logits<MTMLK_SINGLE>,
    linear_logits<double>,
    linear_features<MTMLK_SINGLE>,
    linear_features<double>,
    linear_weights<MTMLK_SINGLE>,
    linear_weights<double>,
    linear_bytes<MTMLK_SINGLE>,
    linear_bytes<double>,
};

}  // namespace mtmlk
