// The building blocks of one instruction set, in files of their own: they compile beside the engine. As in isa_body.h,
// everything that it includes is inside an anonymous namespace.
#include "simd/simd.h"
#include "task_conv2d/kernel.h"
#include "task_linear/kernel.h"
#include "task_update/kernel.h"
#include "isa/dispatch.h"

#if !defined(MTMLK_SINGLE)
#define MTMLK_SINGLE float
#endif

namespace mtmlk {
namespace {

template <class T>
constexpr TaskKernels kTasks = {
    Simd<T>::kLanes,        task_linear_bytes<T>,    task_linear_forward<T>, task_linear_backward<T>,
    task_conv2d_bytes<T>,   task_conv2d_sums<T>,     task_conv2d_forward<T>, task_conv2d_backward<T>,
    task_update_forward<T>, task_update_backward<T>,
};

}  // namespace

const TaskKernels MTMLK_TASK_KERNELS[2] = {kTasks<MTMLK_SINGLE>, kTasks<double>};

}  // namespace mtmlk
