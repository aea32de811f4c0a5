// Embeddings in a plan, and the look at a call's ids before anything is indexed by them.
#include "inner_loop/plan/storage.h"

namespace mtmlk {
namespace {

bool set_ok(const Plan& p, const void* const* x, int64_t tasks, int64_t samples, bool query, MtmlkError* error) {
  if (samples == 0) return true;
  for (int64_t i = 0; i < p.n_values; ++i) {
    const ValuePlan& v = p.values[i];
    if (!v.live || v.op != kEmbedding) continue;
    const int64_t *ids = static_cast<const int64_t*>(x[v.kind]), count = p.params[v.weight].rows;
    for (int64_t n = 0; n < tasks * samples * v.rows; ++n)
      if (ids[n] < 0 || ids[n] >= count) {
        *error = {MTMLK_BAD_ID, query, n / v.rows / samples, n / v.rows % samples, ids[n], nullptr, v.kind, count};
        return false;
      }
  }
  return true;
}

}  // namespace

void mark_ids(PlanStorage& plan) {
  for (const ValuePlan& v : plan.value_store)
    if (v.op == kEmbedding) plan.inputs[v.kind].ids = true;
  for (InputPlan& input : plan.input_store) {
    input.offset = plan.input_size;
    plan.input_size += input.ids ? 0 : input.size;
  }
}

bool ids_ok(const Plan& plan, const MtmlkCall& call, MtmlkError* error) {
  return (plan.steps == 0 ||
          set_ok(plan, call.support_x, call.tasks * plan.support_sets, plan.support.samples, false, error)) &&
         set_ok(plan, call.query_x, call.tasks, plan.query.samples, true, error);
}

}  // namespace mtmlk
