// Planning of convolutions, normalisations and pooling: what runs together, and in which units.
#include "inner_loop/plan/storage.h"

namespace mtmlk {
namespace {

bool is_relu(const ValuePlan& v) { return v.op == kAct && (v.kind == kRelu || (v.kind == kLeakyRelu && v.c0 >= 0)); }

// Windows side by side: every input has at most one output.
bool tiles_image(const ValuePlan& v) {
  const int64_t* w = v.window;
  return v.kind == kMaxPool && w[kKernelY] == w[kStrideY] && w[kKernelX] == w[kStrideX] && w[kPadY] == 0 &&
         w[kPadX] == 0 && w[kDilationY] == 1 && w[kDilationX] == 1 && w[kOutHeight] * w[kKernelY] <= w[kHeight] &&
         w[kOutWidth] * w[kKernelX] <= w[kWidth];
}

int32_t only_reader(const PlanStorage& plan, int32_t value) {
  if (count_uses(plan, value) != 1 || plan.output == value) return -1;
  for (int64_t i = value + 1; i < plan.n_values; ++i)
    if (plan.values[i].live && (plan.values[i].a == value || plan.values[i].b == value)) return int32_t(i);
  return -1;
}

// Bands are cut at multiples of `window` rows.
RowUnits units_of(int64_t rows, int64_t row_bytes, bool whole_only, int64_t bytes, int64_t window = 1) {
  if (rows * row_bytes > bytes) {
    const int64_t band = std::max<int64_t>(1, bytes / (row_bytes * window)) * window;
    return {1, divide_up(rows, band), band};
  }
  return {whole_only ? std::max<int64_t>(1, bytes / (rows * row_bytes)) : 1, 1, rows};
}

int64_t count_units(const RowUnits& u, int64_t samples) { return divide_up(samples, u.samples) * u.bands; }

void place_conv(PlanStorage& plan, ValuePlan& v) {
  const ValuePlan& a = plan.values[v.a];
  const ParamPlan& weight = plan.params[v.weight];
  const int64_t* w = v.window;
  const int64_t bytes = element_bytes(plan.dtype);
  const AxisShape y = {w[kHeight], w[kOutHeight], w[kKernelY], w[kStrideY], w[kPadY], w[kDilationY]};
  const AxisShape x = {w[kWidth], w[kOutWidth], w[kKernelX], w[kStrideX], w[kPadX], w[kDilationX]};
  auto conv = std::make_unique<ConvPlan>();
  conv->taps = weight.taps, conv->channels = weight.cols / weight.taps;
  for (TapPlan* taps : {&conv->forward, &conv->backward}) {
    plan.taps.push_back(std::make_unique<TapStorage>());
    if (taps == &conv->forward)
      make_forward_taps(y, x, a.ld_primal, conv->channels, *plan.taps.back());
    else
      make_backward_taps(y, x, v.ld, weight.rows, *plan.taps.back());
    *taps = plan.taps.back()->plan;
  }
  const int64_t out_row = w[kOutWidth] * v.ld * bytes;
  const bool several = !v.norm || v.norm->kind == kBatchNorm;
  const int64_t window = v.norm && v.norm->pooled ? v.norm->pool_y : 1;  // a unit's peaks are taken as well
  conv->units = units_of(w[kOutHeight], out_row, several, kNearBytes, window);
  conv->groups = {std::max<int64_t>(1, kFarBytes / (v.rows * v.ld * bytes)), 1, w[kOutHeight]};
  if (!a.meta && w[kOutHeight] * out_row > kFarBytes) {
    const int64_t rows = std::max<int64_t>(1, kFarBytes / 3 / (window * out_row)) * window;
    conv->groups = {1, divide_up(w[kOutHeight], rows), rows};
  }
  // Enough pixels a product that loading and storing its sums (48 vectors) stays below a tenth of it.
  const int64_t row = w[kStrideY] * w[kWidth] * a.ld_primal * bytes + out_row, min_pixels = 128;
  conv->grad_rows =
      std::clamp<int64_t>(std::max(kNearBytes / row, divide_up(min_pixels, w[kOutWidth])), 1, w[kOutHeight]);
  conv->grad_samples = 1;
  if (conv->grad_rows == w[kOutHeight])
    conv->grad_samples = std::max({int64_t(1), kNearBytes / (row * w[kOutHeight]), divide_up(min_pixels, v.rows)});
  conv->in_pairs = runs_in_pairs(v, a);
  if (conv->in_pairs) place_pairs(plan, v, *conv, y);
  v.conv = conv.get();
  plan.convs.push_back(std::move(conv));
  plan.heavy = true;
}

void place_sums(PlanStorage& plan, const ValuePlan& v, NormPlan& norm) {
  constexpr int64_t kRows = 256;  // one chain of additions
  const bool several = norm.kind == kBatchNorm;
  norm.sums = units_of(norm.out_rows, 1, several, kRows);
  norm.stats = units_of(v.rows, 1, several, kRows);
  if (!norm.streamed) return;
  norm.stats = plan.values[v.a].conv->units;
  norm.stats.rows *= plan.values[v.a].window[kOutWidth];
}

}  // namespace

void mark_chains(PlanStorage& plan) {
  for (int64_t i = 0; i < plan.n_values; ++i) {
    ValuePlan& v = plan.values[i];
    if (!v.live || v.op != kNorm || (v.kind != kBatchNorm && v.kind != kGroupNorm)) continue;
    plan.norms.push_back(std::make_unique<NormPlan>());
    NormPlan& norm = *plan.norms.back();
    norm = {};
    norm.kind = v.kind, norm.eps = v.c0, norm.self = norm.tail = int32_t(i), norm.slope = 1, norm.out_rows = v.rows;
    norm.groups = v.kind == kBatchNorm ? v.features : int64_t(v.c1);
    v.norm = &norm;
    ValuePlan& before = plan.values[v.a];
    if (before.op == kConv && before.window[kGroups] == 1 && only_reader(plan, v.a) == i)
      before.streamed = norm.streamed = true, before.norm = &norm;
    int32_t next = only_reader(plan, int32_t(i));
    if (next >= 0 && is_relu(plan.values[next])) {
      ValuePlan& act = plan.values[next];
      norm.slope = act.kind == kRelu ? 0.0 : act.c0, norm.tail = next;
      act.in_chain = true, act.norm = &norm;
      next = only_reader(plan, next);
    }
    if (next < 0 || plan.values[next].op != kPool || !tiles_image(plan.values[next])) continue;
    ValuePlan& pool = plan.values[next];
    norm.tail = next, norm.pooled = true, norm.out_rows = pool.rows;
    norm.pool_y = pool.window[kKernelY], norm.pool_x = pool.window[kKernelX];
    pool.in_chain = true, pool.norm = &norm;
  }
}

// Large outputs of a layer that reads the input (few channels, cheap to make) whose peaks are all that the forward pass
// needs: their place in the query set's planes (135 of mini_conv's 541 MB) is worth making them twice.
bool is_remade(const Plan& plan, const ValuePlan& v) {
  return v.op == kConv && v.streamed && v.norm->pooled && !plan.values[v.a].meta &&
         v.rows * v.ld * element_bytes(plan.dtype) > kFarBytes;
}

// Room for what a normalisation keeps a sample; see norm/batch_group.h. A chain's other values have no planes.
void place_norm(Plan& plan, ValuePlan& v) {
  if (!v.norm) return;
  NormPlan& norm = *v.norm;
  const auto take = [&](Plane plane, int64_t size) {
    const int64_t at = plan.plane_size[plane];
    plan.plane_size[plane] += size;
    return at;
  };
  norm.coefs = take(kPrimal, 9 * v.ld);
  norm.coefs_tangent = take(kTangent, 5 * v.ld);
  if (!norm.pooled) return;
  norm.peak = take(kPrimal, norm.out_rows * v.ld);
  norm.peak_tangent = take(kTangent, norm.out_rows * v.ld);
}

void place_images(PlanStorage& plan) {
  for (int64_t i = 0; i < plan.n_values; ++i)
    if (plan.values[i].live && plan.values[i].op == kConv) place_conv(plan, plan.values[i]);
  for (int64_t i = 0; i < plan.n_values; ++i)
    if (plan.values[i].live && plan.values[i].op == kNorm && plan.values[i].norm)
      place_sums(plan, plan.values[i], *plan.values[i].norm);
}

void place_scratch(Plan& plan) {
  const int64_t samples = std::max(plan.support.block_samples, plan.query.block_samples);
  for (int64_t i = 0; i < plan.n_values; ++i) {
    const ValuePlan& v = plan.values[i];
    if (!v.live) continue;
    if (v.op == kNorm) plan.worker_scratch_size = std::max(plan.worker_scratch_size, 8 * v.ld);
    if (v.op == kConv) {
      const int64_t part = part_size(plan, v);
      plan.scratch_size = std::max(plan.scratch_size, kMaxParts * part);
    }
    if (v.op == kNorm && v.norm) {
      const int64_t slots = std::max(count_units(v.norm->stats, samples), count_units(v.norm->sums, samples));
      // sums in double behind the slots
      plan.scratch_size = std::max(plan.scratch_size, kSlotRows * slots * v.ld + 4 * v.ld);
      if (!v.norm->streamed) continue;
      const ValuePlan& conv = plan.values[v.a];
      const int64_t row = conv.window[kOutWidth] * v.ld;
      const int64_t group = std::min(samples, conv.conv->groups.samples) * conv.conv->groups.rows * row;
      plan.worker_scratch_size = std::max(plan.worker_scratch_size, 8 * v.ld + (conv.remade ? 3 : 2) * group);
    }
  }
  place_pair_scratch(plan, samples);
}

}  // namespace mtmlk
