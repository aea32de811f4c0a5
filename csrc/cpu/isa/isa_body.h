// The engine, compiled once per instruction set: isa_*.cpp defines MTMLK_ISA_* and MTMLK_KERNELS and includes this
// file. Everything that it includes is inside an anonymous namespace: a weak symbol could make the linker choose one
// set's code for another.
#include "simd/simd.h"
#include "inner_loop/carry.h"
#include "inner_loop/driver.h"
#include "head_inner_loop/driver.h"
#include "multihead_loss/kernel.h"
#include "linear_multihead_loss/kernel.h"
#include "isa/dispatch.h"
#include "isa/fma_peak.h"

// Builds under sanitizers (tests/fuzz) instantiate one type only: half the compilation.
#if !defined(MTMLK_SINGLE)
#define MTMLK_SINGLE float
#endif

namespace mtmlk {
namespace {

template <class T>
constexpr TypedKernels kTyped = {
    Simd<T>::kLanes,      run_inner_loop<T>,   carry_to_grads<T>,  workspace_bytes<T>, head_loop_bytes<T>,
    run_head_loop<T>,     head_chain_bytes<T>, run_head_chain<T>,  multihead_norms<T>, multihead_losses<T>,
    multihead_scratch<T>, linear_logits<T>,    linear_features<T>, linear_weights<T>,  linear_bytes<T>,
};

}  // namespace

const Kernels MTMLK_KERNELS = {MTMLK_ISA_NAME, kTyped<MTMLK_SINGLE>, kTyped<double>, measure_fma_peak};

}  // namespace mtmlk
