// Planning of convolutions that run two pixels at a time, see conv/pairs.h.
#include "inner_loop/plan/storage.h"

namespace mtmlk {

// With fewer than 16 channels (one vector) on either side the transforms would cost about what the products save.
bool runs_in_pairs(const ValuePlan& v, const ValuePlan& a) {
  constexpr int64_t kFew = 16;
  const int64_t* w = v.window;
  return w[kKernelX] == 3 && w[kStrideX] == 1 && w[kDilationX] == 1 && w[kGroups] == 1 && !v.remade &&
         a.ld_primal == a.ld && a.features >= kFew && v.features >= kFew && w[kOutWidth] >= 4;
}

void place_pairs(PlanStorage& plan, const ValuePlan& v, ConvPlan& conv, const AxisShape& y) {
  const ValuePlan& a = plan.values[v.a];
  const int64_t* w = v.window;
  const int64_t bytes = element_bytes(plan.dtype);
  for (PairPlan* p : {&conv.pairs_forward, &conv.pairs_backward}) {
    const bool forward = p == &conv.pairs_forward;
    const ValuePlan &source = forward ? a : v, &dest = forward ? v : a;
    plan.taps.push_back(std::make_unique<TapStorage>());
    p->forward = forward;
    p->width = w[forward ? kOutWidth : kWidth], p->source_width = w[forward ? kWidth : kOutWidth];
    p->source_height = w[forward ? kHeight : kOutHeight], p->pad_x = forward ? w[kPadX] : 2 - w[kPadX];
    p->pairs = divide_up(p->width, 2);
    p->stride = y.stride, p->pad_y = y.pad, p->reach = (y.kernel - 1) * y.dilation;
    p->kernel_y = y.kernel, p->weight_rows = y.kernel * source.features;
    const AxisShape x = {p->pairs, p->pairs, 1, 1, 0, 1};
    (forward ? make_forward_taps : make_backward_taps)(y, x, source.ld, source.features, *plan.taps.back());
    p->taps = plan.taps.back()->plan;
    p->band_rows = std::max<int64_t>(4, kFarBytes / 3 / (4 * p->pairs * source.ld * bytes));
    p->step_rows = std::max<int64_t>(1, kNearBytes / 2 / (4 * p->pairs * dest.ld * bytes));
  }
}

// Elements of a part's weight gradient, its bias gradient, and the transformed gradient.
int64_t part_size(const Plan& plan, const ValuePlan& v) {
  const int64_t weight = plan.params[v.weight].size;
  return weight + v.ld + (v.conv->in_pairs ? 4 * (weight / 3) : 0);
}

// Room for the planes of two products' sources, and of what they give.
void place_pair_scratch(Plan& plan, int64_t samples) {
  int64_t weights = 0, planes = 0;
  for (int64_t i = 0; i < plan.n_values; ++i) {
    const ValuePlan& v = plan.values[i];
    if (!v.live || v.op != kConv || !v.conv->in_pairs) continue;
    const ValuePlan& a = plan.values[v.a];
    const ParamPlan& w = plan.params[v.weight];
    weights = std::max(weights, 8 * (std::max(w.size, w.size_t_) / 3));
    for (const PairPlan* p : {&v.conv->pairs_forward, &v.conv->pairs_backward}) {
      const int64_t source_ld = p->forward ? a.ld : v.ld, dest_ld = p->forward ? v.ld : a.ld;
      const int64_t most = std::min(samples, p->forward ? v.conv->units.samples : v.conv->groups.samples);
      const int64_t sources = std::min(p->source_height, (p->band_rows + p->reach) * (p->forward ? p->stride : 1) + 1);
      planes = std::max(planes, 4 * most * p->pairs * (2 * sources * source_ld + p->step_rows * dest_ld));
    }
    const PairPlan& p = v.conv->pairs_forward;
    const int64_t most = std::min(samples, v.conv->grad_samples);
    const int64_t sources = std::min(p.source_height, (v.conv->grad_rows + p.reach) * p.stride + 1);
    planes = std::max(planes, 8 * most * p.pairs * (sources * a.ld + v.conv->grad_rows * v.ld));
  }
  plan.pair_weights = round_up(plan.scratch_size, plan.lanes);
  plan.scratch_size = plan.pair_weights + weights;
  plan.worker_pairs = round_up(plan.worker_scratch_size, plan.lanes);
  plan.worker_scratch_size = plan.worker_pairs + planes;
}

}  // namespace mtmlk
