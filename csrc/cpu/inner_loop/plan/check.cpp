// What a plan's specification must say before anything is laid out by it: programs also come from exported graphs and
// from hands. Layout and kernels trust what passes here.
#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "inner_loop/plan/layers.h"
#include "inner_loop/plan/storage.h"
#include "mtml/losses.h"
#include "mtml/update.h"

namespace mtmlk {
namespace {

using Long = long long;

constexpr int64_t kMostElements = int64_t(1) << 40;      // of one tensor
constexpr double kMostTotal = double(int64_t(1) << 50);  // of all that a task needs; products of 64 bits stay exact

bool check_counts(const MtmlkPlanSpec& spec, const Why& why) {
  const int64_t *p = spec.program, n = spec.n_program;
  if (n < kHeaderInts || p[0] != kVersion)
    return why("expected an encoding of version %d, got %lld", kVersion, n > 0 ? Long(p[0]) : -1LL);
  for (int i = 1; i <= 3; ++i)
    if (p[i] < 0 || p[i] > n) return why("expected counts from 0 to its length, got %lld", Long(p[i]));
  const int64_t expected = kHeaderInts + p[1] + kParamInts * p[2] + kNodeInts * p[3];
  if (n != expected) return why("its header asks for %lld integers, got %lld", Long(expected), Long(n));
  if (p[4] < 0 || p[4] >= p[3]) return why("expected an output among %lld nodes, got %lld", Long(p[3]), Long(p[4]));
  if (spec.n_adapted != p[2])
    return why("expected adapted to have a flag for each of %lld parameters, got %lld", Long(p[2]),
               Long(spec.n_adapted));
  return true;
}

bool check_tensors(const MtmlkPlanSpec& spec, const Why& why) {
  const int64_t* p = spec.program + kHeaderInts;
  const int64_t n_inputs = spec.program[1], n_params = spec.program[2];
  for (int64_t i = 0; i < n_inputs; ++i, ++p)
    if (*p < 1 || *p > kMostElements)
      return why("input %lld: expected 1 to 2^40 elements, got %lld", Long(i), Long(*p));
  for (int64_t i = 0; i < n_params; ++i, p += kParamInts) {
    if (p[0] < kLinearWeight || p[0] > kInOutWeight)
      return why("parameter %lld: unknown layout %lld", Long(i), Long(p[0]));
    if (p[1] < 1 || p[2] < 1 || p[1] > kMostElements || p[2] > kMostElements / p[1])
      return why("parameter %lld: expected 1 to 2^40 elements, got [%lld, %lld]", Long(i), Long(p[1]), Long(p[2]));
    if (p[0] == kStepRows && spec.adapted[i])
      return why("parameter %lld: one that has a row for every step is never adapted", Long(i));
  }
  return true;
}

bool check_options(const MtmlkPlanSpec& spec, const Why& why) {
  if (spec.dtype != MTMLK_F32 && spec.dtype != MTMLK_F64) return why("unknown dtype %d", spec.dtype);
  if (spec.steps < 0 || spec.steps > INT32_MAX) return why("expected 0 to 2^31 steps, got %lld", Long(spec.steps));
  for (const int64_t samples : {spec.support, spec.query})
    if (samples < 0 || samples > kMostElements) return why("expected 0 to 2^40 samples, got %lld", Long(samples));
  for (const MtmlkLoss& loss : {spec.support_loss, spec.query_loss})
    if (loss.kind < 0 || loss.kind >= kLossCount || loss.reduction < 0 || loss.reduction > 1)
      return why("expected a loss of kind 0 to %d and reduction 0 or 1, got [%d, %d]", kLossCount - 1, loss.kind,
                 loss.reduction);
  if (spec.needs < 0 || spec.needs > 1023) return why("expected needs from 0 to 1023, got %d", spec.needs);
  if (spec.rule < kSgd || spec.rule > kRmsprop) return why("expected an update rule from 0 to 2, got %d", spec.rule);
  if (spec.rule_flags < 0 || spec.rule_flags > 63)
    return why("expected flags of the update rule from 0 to 63, got %d", spec.rule_flags);
  if (spec.taken < 0) return why("expected a number of steps taken of at least 0, got %lld", Long(spec.taken));
  if (spec.keep < 0 || spec.keep > 2) return why("expected keep from 0 to 2, got %d", spec.keep);
  if (spec.form < MTMLK_AUTO || spec.form > MTMLK_LOW_RANK) return why("unknown form %d", spec.form);
  return true;
}

bool check_rates(const MtmlkPlanSpec& spec, const Why& why) {
  int64_t adapted = 0;
  for (int64_t i = 0; i < spec.n_adapted; ++i) adapted += spec.adapted[i] != 0;
  if (spec.n_lr != 1 && spec.n_lr != adapted)
    return why("expected lr to be 1 tensor or one for each of %lld adapted parameters, got %lld", Long(adapted),
               Long(spec.n_lr));
  for (int64_t i = 0; i < spec.n_lr; ++i) {
    if (spec.lr_steps[i] != 1 && spec.lr_steps[i] != spec.steps)
      return why("expected lr for 1 or %lld steps, got %lld", Long(spec.steps), Long(spec.lr_steps[i]));
    if (spec.lr_elements[i] && spec.n_lr == 1 && adapted != 1)
      return why("expected one lr of each element only where one parameter is adapted, got %lld", Long(adapted));
  }
  return true;
}

}  // namespace

bool Why::operator()(const char* format, ...) const {
  if (!to_) return false;
  va_list args;
  va_start(args, format);
  vsnprintf(to_->text, sizeof to_->text, format, args);
  va_end(args);
  return false;
}

bool check_header(const MtmlkPlanSpec& spec, const Why& why) {
  return check_counts(spec, why) && check_tensors(spec, why) && check_options(spec, why) && check_rates(spec, why);
}

bool check_window(const double* c, const Why& why) {
  constexpr double kSide = double(1 << 28), kStep = double(1 << 20);
  for (int i = kHeight; i <= kOutWidth; ++i)
    if (!is_count(c[i], 1, kSide)) return why("a window's image: expected sides from 1 to 2^28, got %g", c[i]);
  for (int i = kKernelY; i <= kDilationX; ++i)
    if (!is_count(c[i], i == kPadY || i == kPadX ? 0 : 1, kStep))
      return why("a window: expected kernel, stride, padding and dilation from 1 (padding: 0) to 2^20, got %g", c[i]);
  if (!is_count(c[kGroups], -1, kSide))
    return why("a window's groups or divisor: expected -1 to 2^28, got %g", c[kGroups]);
  return true;
}

namespace {

// Ids are as wide in either dtype: nothing else can read them.
bool check_ids(const PlanStorage& plan, const Why& why) {
  std::vector<bool> ids(size_t(plan.n_inputs), false);
  for (const ValuePlan& v : plan.value_store)
    if (v.op == kEmbedding) ids[size_t(v.kind)] = true;
  for (int64_t i = 0; i < plan.n_values; ++i)
    if (plan.values[i].op == kInput && ids[size_t(plan.values[i].kind)])
      return why("node %lld (input): input %d holds ids, which an embedding reads, and cannot be a value as well",
                 Long(i), plan.values[i].kind);
  return true;
}

}  // namespace

bool check_program(const PlanStorage& plan, const Why& why) {
  std::vector<int64_t> taps(size_t(plan.n_params), 0);
  for (int64_t i = 0; i < plan.n_values; ++i) {
    const ValuePlan& v = plan.values[i];
    if (!check_node(plan, i, why)) return false;
    if (v.op != kConv) continue;
    int64_t& known = taps[size_t(v.weight)];
    const int64_t own = v.window[kKernelY] * v.window[kKernelX];
    if (known && known != own) return why("node %lld (conv): its weight has another kernel elsewhere", Long(i));
    known = own;
  }
  if (!check_ids(plan, why)) return false;
  const ValuePlan& output = plan.values[plan.output];
  if (!output.batched) return why("expected an output of every sample, got one of parameters alone");
  const bool classes = is_of_classes(plan.support_loss.kind) || is_of_classes(plan.query_loss.kind);
  if (classes && output.rows != 1)
    return why("expected one row of classes a sample for cross_entropy, got %lld rows", Long(output.rows));
  return true;
}

bool check_sizes(const Plan& plan, const MtmlkPlanSpec& spec, const Why& why) {
  constexpr double kPadding = 16;  // lanes
  double planes = 0, params = 0, rows = 1;
  for (int64_t i = 0; i < plan.n_values; ++i) {
    const ValuePlan& v = plan.values[i];
    planes += 8 * (double(v.rows) + 10) * (double(v.features) + kPadding);
    rows = std::max(rows, double(v.rows));
  }
  for (int64_t i = 0; i < plan.n_params; ++i) {
    const ParamPlan& p = plan.params[i];
    params += 32 * (double(p.rows) + kPadding) * (double(p.cols) + kPadding);
  }
  const double samples = double(spec.support) + double(spec.query) + 1, steps = double(spec.steps) + 2;
  const double factors = spec.form == MTMLK_LOW_RANK ? rows * samples * rows * samples * double(plan.n_params) : 0;
  const double total = (planes * samples + params + factors) * steps;
  return total <= kMostTotal || why("its values, samples and steps need %g elements a task, more than 2^50", total);
}

}  // namespace mtmlk
