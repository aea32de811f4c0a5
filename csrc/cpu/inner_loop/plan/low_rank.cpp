// Which weights stay in low-rank form (low_rank.h), and where a task's planes lie then.
#include "inner_loop/plan/storage.h"

namespace mtmlk {
namespace {

// Elements of a task's planes: of all steps, and of its query set (the planes of tangents are the support set's alone).
struct TaskPlanes {
  int64_t step, query;
};

TaskPlanes task_planes(const Plan& plan, int64_t support, int64_t query) {
  const int64_t aux = plan.values[plan.output].rows * plan.values[plan.output].ld;
  const int64_t once = aux + plan.plane_size[kPrimal] + plan.plane_size[kDelta];
  const int64_t tangents = plan.needs ? plan.plane_size[kTangent] + plan.plane_size[kDeltaTangent] : 0;
  return {(once + tangents) * support, once * query};
}

// Whether low-rank form can be exact here at all: it keeps the planes of every pass whole, and no task's weights.
bool plan_allows(const Plan& plan, const MtmlkPlanSpec& spec) {
  if (spec.form == MTMLK_WEIGHTS || plan.keep != 0 || plan.mixes || !plan.plain || plan.starts) return false;
  if (plan.query_steps || plan.tasks_apart) return false;
  constexpr int64_t kTaskBytes = 4 << 20;  // of planes, of which several tasks' are held at once
  const TaskPlanes planes = task_planes(plan, spec.support, spec.query);
  const int64_t bytes = (spec.steps * planes.step + planes.query) * element_bytes(plan.dtype);
  if (spec.form == MTMLK_AUTO && bytes > kTaskBytes) return false;
  // Gradients are summed over the tasks; where a row each would be carried, the choice must not depend on more sizes
  // than the carry's shape does.
  if (spec.form == MTMLK_AUTO && params_room(plan) * element_bytes(plan.dtype) <= kTaskCarryBytes) return false;
  for (int64_t i = 0; i < plan.n_values; ++i)
    if (plan.values[i].live && plan.values[i].op == kConv) return false;
  return true;
}

bool has_element_rates(const Plan& plan, const MtmlkPlanSpec& spec, int64_t param) {
  int64_t nth = 0;
  for (int64_t i = 0; i < param; ++i) nth += plan.params[i].adapted;
  return plan.params[param].adapted && spec.lr_elements[plan.n_lr == 1 ? 0 : nth] != 0;
}

// The one linear layer over samples that reads a packed weight, else -1. Gradients of the user's own inputs would need
// them as aligned rows.
int32_t only_layer(const Plan& plan, int64_t param) {
  int32_t found = -1;
  for (int64_t i = 0; i < plan.n_values; ++i) {
    const ValuePlan& v = plan.values[i];
    if (!v.live || (v.weight != param && v.bias != param)) continue;
    const ValuePlan* a = v.a >= 0 ? &plan.values[v.a] : nullptr;
    if (found >= 0 || v.op != kLinear || !v.batched || !a->batched || v.bias == param) return -1;
    if (a->direct_input && a->meta) return -1;
    found = int32_t(i);
  }
  return found;
}

// What low-rank form saves for one weight, task and call, in multiply-adds: of the I x O elements those of its inner
// gradient and of V, and the passes over weight and gradient (theta and V written, transposed, read; lambda written and
// summed); less the thin products. S, Q: rows of the support and query set; K: steps.
//
// Fitted on 54 shapes (widths 128 to 1024, S 1 to 25, Q 15 and 75, K 1 to 10; one thread, AVX2): a pass takes the time
// of 40 multiply-adds of a large product, a multiply-add of a thin product that of 2.7. bench/LADDER.md has the ratios.
double saving(const Plan& plan, const MtmlkPlanSpec& spec, const ParamPlan& w) {
  constexpr double kThin = 2.7, kPasses = 40;
  const double rows = double(plan.values[w.layer].rows), steps = double(spec.steps);
  const double support = double(spec.support) * rows, query = double(spec.query) * rows;
  const double elements = double(w.cols) * double(w.rows), both = double(w.cols + w.rows);
  const double pairs = 0.5 * steps * (steps - 1);  // of a step with one before it
  const double theta = both * support * (steps * query + pairs * support);
  if (plan.needs == 0) return steps * elements * (kPasses / 4 + support) - kThin * theta;
  if (plan.first_order) return steps * elements * (kPasses / 2 + support) - 2 * kThin * theta;
  // half of V's products with the query set are kept from the forward pass
  const double along = both * support * (0.5 * steps * query + 3 * pairs * support);
  return steps * elements * (kPasses + 3 * support) - 2 * kThin * (theta + along);
}

}  // namespace

void mark_low_rank(PlanStorage& plan, const MtmlkPlanSpec& spec) {
  const bool allowed = plan_allows(plan, spec);
  for (int64_t i = 0; i < plan.n_params; ++i) {
    ParamPlan& w = plan.params[i];
    w.layer = -1, w.stepped = w.adapted;
    if (!allowed) continue;
    const bool packed = w.layout == kLinearWeight && !w.narrow;
    if (!packed || !w.meta || has_element_rates(plan, spec, i)) continue;
    w.layer = only_layer(plan, i);
    w.low = w.layer >= 0 && (spec.form == MTMLK_LOW_RANK || saving(plan, spec, w) > 0);
    w.stepped = w.adapted && !w.low;
    plan.low_rank |= w.low && w.adapted;
  }
  if (plan.low_rank) return;
  for (int64_t i = 0; i < plan.n_params; ++i) {
    ParamPlan& w = plan.params[i];
    w.low = false, w.stepped = w.adapted;
  }
}

// One block holds a set, so that a weight's factors are whole.
void place_low_state(Plan& plan) {
  const int64_t support = plan.support.samples, query = plan.query.samples;
  const TaskPlanes planes = task_planes(plan, support, query);
  plan.keep_planes = true, plan.slots = std::max<int64_t>(plan.steps, 1);
  plan.state_size = plan.state_blocks + planes.step;
  plan.query_at = plan.slots * plan.state_size;
  plan.task_size = plan.query_at + planes.query;
  plan.transient_size = 0;
  int64_t rows = 1;
  for (int64_t i = 0; i < plan.n_values; ++i)
    if (plan.values[i].live && plan.values[i].batched) rows = std::max(rows, plan.values[i].rows);
  plan.task_rows = rows * (query + 2 * plan.steps * support);
  plan.gram_size = 2 * rows * rows * support * std::max(support, query);
  plan.kept_size = rows * rows * support * query;
}

}  // namespace mtmlk
