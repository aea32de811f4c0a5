// The C ABI: checks, workspace, dispatch.
#include <utility>
#include <vector>

#include "mtml/abi.h"
#include "mtml/program.h"
#include "mtml/sizes.h"
#include "runtime/threads.h"
#include "runtime/watch.h"
#include "runtime/workspace.h"
#include "runtime/labels.h"
#include "inner_loop/plan/plan.h"
#include "isa/dispatch.h"

namespace mtmlk {
namespace {

// What a call lacks, or nullptr. Tensors without elements need no memory.
const char* missing(const Plan& p, const MtmlkCall& call) {
  const auto lacks = [](const void* const* list, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
      if (!list || !list[i]) return true;
    return false;
  };
  if (lacks(call.params, p.n_params)) return "params";
  if (p.steps > 0 && lacks(call.lr, p.n_lr)) return "lr";
  if (p.steps > 0 && p.support.samples > 0) {
    if (lacks(call.support_x, p.n_inputs)) return "support_x";
    if (!call.support_y) return "support_y";
  }
  if (p.query.samples > 0 && lacks(call.query_x, p.n_inputs)) return "query_x";
  if (!p.plain && !call.hyper) return "hyper";
  if (call.differentiate && !call.carry) return "carry";
  if (call.differentiate && !p.needs) return "needs";  // the plan has no room for tangents
  const std::pair<void*, int> wanted[] = {
      {call.grad_support_x, MTMLK_NEED_SUPPORT_X},       {call.grad_query_x, MTMLK_NEED_QUERY_X},
      {call.grad_support_y, MTMLK_NEED_SUPPORT_Y},       {call.grad_query_y, MTMLK_NEED_QUERY_Y},
      {call.grad_support_mask, MTMLK_NEED_SUPPORT_MASK}, {call.grad_query_mask, MTMLK_NEED_QUERY_MASK}};
  for (const auto& [at, bit] : wanted)
    if (at && !(p.needs & bit)) return "needs";
  // class ids have no gradient, and no room for one
  if (call.grad_support_y && p.support_loss.kind == kCrossEntropy) return "grad_support_y";
  if (call.grad_query_y && p.query_loss.kind == kCrossEntropy) return "grad_query_y";
  return nullptr;
}

int threads_of(const Plan& p, int64_t tasks, int most) { return threads_for(p.task_work * double(tasks), most); }

}  // namespace

}  // namespace mtmlk

using namespace mtmlk;

struct MtmlkPlan {
  Plan* plan;
};

extern "C" {

int mtmlk_plan_create(const MtmlkPlanSpec* spec, MtmlkPlan** out, MtmlkReason* reason) {
  Plan* plan = nullptr;
  const int status = create_plan(*spec, kernels_of(spec->dtype).lanes, &plan, reason);
  if (status == MTMLK_OK) *out = new MtmlkPlan{plan};
  return status;
}

void mtmlk_plan_destroy(MtmlkPlan* plan) {
  destroy_plan(plan->plan);
  delete plan;
}

void mtmlk_plan_info(const MtmlkPlan* handle, MtmlkPlanInfo* info) {
  const Plan& p = *handle->plan;
  int64_t low = 0;
  for (int64_t i = 0; i < p.n_params; ++i) low += p.params[i].low;
  *info = {p.carry_room,
           p.carry_per_task ? 1 : 0,
           p.support_sets * p.support.samples * p.input_size,
           p.query.samples * p.input_size,
           low,
           p.n_params,
           p.n_inputs,
           p.n_lr,
           p.n_adapted,
           p.n_moments};
}

int32_t mtmlk_plan_threads(const MtmlkPlan* handle, int64_t tasks, int32_t most) {
  if (tasks <= 0) return 1;
  const Split split = split_tasks(*handle->plan, tasks, threads_of(*handle->plan, tasks, most));
  return split.seats * split.workers;
}

int32_t mtmlk_reads_ids(const MtmlkPlan* handle, int64_t input) { return handle->plan->inputs[input].ids; }

int mtmlk_inner_loop(const MtmlkPlan* handle, const MtmlkCall* given, MtmlkError* error) {
  const Plan& p = *handle->plan;
  MtmlkCall call = *given;
  if (call.tasks == 0) return MTMLK_OK;
  error->what = call.tasks < 0 ? "tasks" : missing(p, call);
  if (error->what) return MTMLK_BAD_CALL;
  if (p.support_loss.kind == kCrossEntropy && p.steps > 0 &&
      !labels_ok(call.support_y, call.tasks * p.support_sets, p.support.samples, p.out_features, false, error))
    return MTMLK_BAD_LABEL;
  if (p.query_loss.kind == kCrossEntropy &&
      !labels_ok(call.query_y, call.tasks, p.query.samples, p.out_features, true, error))
    return MTMLK_BAD_LABEL;
  if (!ids_ok(p, call, error)) return MTMLK_BAD_ID;
  call.threads = threads_of(p, call.tasks, call.threads);
  const TypedKernels& k = kernels_of(p.dtype);
  Watch watch = start_watch();
  const Workspace workspace(k.workspace_bytes(p, call.tasks, call.threads, call.carry != nullptr), &watch);
  if (!workspace.data()) return workspace.status();
  k.inner_loop(p, call, workspace.data(), &watch);
  return watch.stopped ? MTMLK_STOPPED : MTMLK_OK;
}

int mtmlk_carry_to_grads(const MtmlkPlan* handle, const void* carry, int64_t tasks, const void* scale,
                         int64_t scale_stride, void* const* grads, void* const* lr_grads, void* hyper_grads,
                         void* const* moment_grads, int32_t threads) {
  const Plan& p = *handle->plan;
  const bool f32 = p.dtype == MTMLK_F32;
  if (!p.carry_per_task)
    for (int64_t t = 1; t < tasks && scale_stride; ++t) {
      const auto at = [&](int64_t i) {
        return f32 ? double(static_cast<const float*>(scale)[i]) : static_cast<const double*>(scale)[i];
      };
      if (at(t * scale_stride) != at(0)) return 1;
    }
  Watch watch = start_watch();
  const Workspace workspace(p.carry_room * element_bytes(p.dtype), &watch);
  if (!workspace.data()) return workspace.status();
  std::vector<void*> targets(grads, grads + p.n_params);
  targets.push_back(workspace.data());
  const CarryTargets to = {targets.data(), lr_grads, hyper_grads, moment_grads};
  kernels_of(p.dtype).carry_to_grads(p, carry, p.carry_per_task ? tasks : 1, scale, scale_stride, to, threads);
  return MTMLK_OK;
}

}  // extern "C"
