// The engine, compiled once per instruction set: isa_*.cpp defines MTMLK_ISA_* and MTMLK_KERNELS and includes this
// file. Everything is inside an anonymous namespace: a weak symbol could make the linker choose one set's code for
// another.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <omp.h>
#include <stdint.h>
#include <time.h>

#include "dispatch.h"
#include "plan.h"

namespace mtmlk {
namespace {

#include "simd.h"
#include "stops.h"
#include "vmath.h"
#include "gemm.h"
#include "dots.h"
#include "layout.h"
#include "act.h"
#include "loss.h"
#include "block.h"
#include "low_rank.h"
#include "low_rank_sum.h"
#include "linear.h"
#include "nodes.h"
#include "conv.h"
#include "conv_pairs.h"
#include "conv_node.h"
#include "conv_group.h"
#include "norm_stats.h"
#include "norm_sums.h"
#include "norm.h"
#include "norm_stream.h"
#include "norm_node.h"
#include "norm_layer.h"
#include "pool.h"
#include "node_dispatch.h"
#include "task.h"
#include "task_passes.h"
#include "task_reverse.h"
#include "driver.h"
#include "head_loss.h"
#include "head_features.h"
#include "head_task.h"
#include "head_reverse.h"
#include "head_chain.h"
#include "head_driver.h"
#include "fma_peak.h"
#include "head_math.h"
#include "head_tile.h"
#include "head_rows.h"
#include "head_elements.h"
#include "heads.h"
#include "heads_linear.h"

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
