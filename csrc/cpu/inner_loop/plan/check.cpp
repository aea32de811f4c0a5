// What a plan's specification must say before anything is laid out by it: programs also come from exported graphs and
// from hands. Layout and kernels trust what passes here.
#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "inner_loop/plan/storage.h"

namespace mtmlk {
namespace {

using Long = long long;

constexpr int64_t kMostElements = int64_t(1) << 40;      // of one tensor
constexpr double kMostTotal = double(int64_t(1) << 50);  // of all that a task needs; products of 64 bits stay exact
constexpr double kMostTaps = double(1 << 26);            // runs of a convolution's plan, 24 bytes each

const char* const kOpNames[kOpCount] = {"input",  "param",  "view",      "linear", "act",  "add",  "mul",      "cat",
                                        "expand", "affine", "transpose", "conv",   "norm", "pool", "embedding"};

bool reads_a(int32_t op) { return op != kInput && op != kParam && op != kEmbedding; }  // a as an earlier node
bool reads_b(int32_t op) { return op == kAdd || op == kMul || op == kCat; }
bool reads_weight(int32_t op) {
  return op == kParam || op == kLinear || op == kConv || op == kNorm || op == kEmbedding;
}
bool reads_bias(int32_t op) { return op == kLinear || op == kConv || op == kNorm; }

bool is_count(double c, double least, double most) { return c >= least && c <= most && c == floor(c); }

// One node, and what to say of it.
class NodeCheck {
 public:
  NodeCheck(const PlanStorage& plan, int64_t index, const Why& why)
      : plan_(plan), v_(plan.values[index]), index_(index), why_(why) {}

  bool passes() const {
    if (v_.op < 0 || v_.op >= kOpCount) return why_("node %lld: unknown operation %d", Long(index_), v_.op);
    if (v_.rows < 1 || v_.features < 1) return fails("expected at least one row and feature");
    return indices() && form();
  }

 private:
  bool fails(const char* what) const {
    return why_("node %lld (%s): %s (it gives %lld rows of %lld)", Long(index_), kOpNames[v_.op], what, Long(v_.rows),
                Long(v_.features));
  }

  bool indices() const {
    if (!(reads_a(v_.op) ? v_.a >= 0 && v_.a < index_ : v_.a < 0))
      return fails("expected a to be an earlier node, or -1 where the operation reads none");
    if (!(reads_b(v_.op) ? v_.b >= 0 && v_.b < index_ : v_.b < 0))
      return fails("expected b to be an earlier node, or -1 where the operation reads none");
    const bool must = v_.op != kNorm && reads_weight(v_.op);
    if (v_.weight >= (reads_weight(v_.op) ? plan_.n_params : 0) || (must && v_.weight < 0))
      return fails("expected weight to be a parameter, or -1 where the operation reads none");
    if (v_.bias >= (reads_bias(v_.op) ? plan_.n_params : 0))
      return fails("expected bias to be a parameter, or -1 where the operation reads none");
    return true;
  }

  bool form() const {
    switch (v_.op) {
      case kInput:
        return input();
      case kParam:
        return param();
      case kLinear:
        return linear();
      case kAct:
        if (v_.kind < 0 || v_.kind >= kActCount) return fails("unknown activation");
        return like_a();
      case kAffine:
        return like_a();
      case kAdd:
      case kMul:
        return pair();
      case kCat:
        return cat();
      case kExpand:
        if (a().batched || a().rows != 1 || a().features != v_.features || !v_.batched)
          return fails("expected one row of as many features, from parameters alone, to repeat over the samples");
        return true;
      case kView:
        if (a().batched != v_.batched || a().rows * a().features != v_.rows * v_.features)
          return fails("expected as many elements as a has");
        return true;
      case kTranspose:
        if (v_.rows != a().features || v_.features != a().rows || v_.batched != a().batched)
          return fails("expected a's rows and features in each other's place");
        return true;
      case kNorm:
        return norm();
      case kEmbedding:
        return embedding();
      default:
        return window() && (v_.op == kPool ? pool() : conv());
    }
  }

  const ValuePlan& a() const { return plan_.values[v_.a]; }
  const ValuePlan& b() const { return plan_.values[v_.b]; }

  bool like_a() const {
    if (v_.rows == a().rows && v_.features == a().features && v_.batched == a().batched) return true;
    return fails("expected the rows and features of a");
  }

  bool input() const {
    if (v_.kind < 0 || v_.kind >= plan_.n_inputs) return fails("expected a to be an input of the program");
    if (!v_.batched || v_.rows * v_.features != plan_.inputs[v_.kind].size)
      return fails("expected as many elements as a sample of the input has");
    return true;
  }

  bool param() const {
    const ParamPlan& p = plan_.params[v_.weight];
    if (v_.batched || p.layout != kRows || p.rows != v_.rows || p.cols != v_.features)
      return fails("expected the rows and columns of a plain parameter");
    return true;
  }

  bool linear() const {
    const ParamPlan& w = plan_.params[v_.weight];
    if (w.layout != kLinearWeight || w.rows != v_.features || w.cols != a().features)
      return fails("expected a linear weight of [features, features of a]");
    if (v_.rows != a().rows || v_.batched != a().batched) return fails("expected the rows of a");
    return one_row(v_.bias) || fails("expected a bias of one row of features");
  }

  // Every operand has the result's rows, or is one row that all samples share; and its features, or one.
  bool pair() const {
    const auto fits = [&](const ValuePlan& x) {
      const bool rows = x.batched == v_.batched ? x.rows == v_.rows || (x.rows == 1 && !x.batched)
                                                : !x.batched && (x.rows == v_.rows || x.rows == 1);
      return rows && (x.features == v_.features || x.features == 1);
    };
    const bool whole =
        std::max(a().features, b().features) == v_.features && v_.batched == (a().batched || b().batched);
    if (!whole || std::max(a().rows, b().rows) != v_.rows || !fits(a()) || !fits(b()))
      return fails("expected operands that broadcast to its rows and features");
    return true;
  }

  bool cat() const {
    const bool rows = a().rows == v_.rows && b().rows == v_.rows, batched = a().batched == v_.batched;
    if (!rows || !batched || b().batched != v_.batched || a().features + b().features != v_.features)
      return fails("expected operands of its rows whose features add up to its own");
    return true;
  }

  bool one_row(int32_t param) const {
    if (param < 0) return true;
    const ParamPlan& p = plan_.params[param];
    return p.cols == v_.features && (p.layout == kStepRows || (p.layout == kRows && p.rows == 1));
  }

  bool norm() const {
    if (v_.kind < kBatchNorm || v_.kind > kLayerNorm) return fails("unknown normalisation");
    if (!v_.batched || !like_a()) return fails("expected a value of every sample, with the rows and features of a");
    if (!(v_.c1 >= 1 && v_.c1 <= double(v_.features)) || v_.features % int64_t(v_.c1) != 0)
      return fails("expected a number of groups that divides the features");
    return (one_row(v_.weight) && one_row(v_.bias)) || fails("expected a weight and a bias of one row of features");
  }

  bool embedding() const {
    if (v_.kind < 0 || v_.kind >= plan_.n_inputs) return fails("expected a to be an input of the program");
    const ParamPlan& table = plan_.params[v_.weight];
    if ((table.layout != kRows && table.layout != kLinearWeight) || table.cols != v_.features)
      return fails("expected a table of rows of its features, or a linear weight");
    if (!v_.batched || v_.rows != plan_.inputs[v_.kind].size)
      return fails("expected a row for every id that a sample of the input has");
    return is_count(v_.c0, -1, double(table.rows - 1)) ||
           fails("expected its padding id to be a row of the table, or -1");
  }

  bool window() const {
    const int64_t* w = v_.window;
    if (!v_.batched || !a().batched || a().rows != w[kHeight] * w[kWidth] || v_.rows != w[kOutHeight] * w[kOutWidth])
      return fails("expected images of every sample whose points are its window's height times width");
    return true;
  }

  bool pool() const {
    if (v_.kind < kMaxPool || v_.kind > kAdaptiveAvgPool) return fails("unknown pooling");
    return v_.features == a().features || fails("expected the features of a");
  }

  bool conv() const {
    const ParamPlan& weight = plan_.params[v_.weight];
    const int64_t* w = v_.window;
    const int64_t groups = w[kGroups], taps = w[kKernelY] * w[kKernelX];
    if (groups < 1 || v_.features % groups != 0 || a().features % groups != 0)
      return fails("expected groups that divide the channels on both sides");
    if (weight.layout != kConvWeight || weight.rows != v_.features || weight.cols / taps != a().features / groups ||
        weight.cols % taps != 0)
      return fails("expected a convolution's weight of [channels, channels of a / groups, kernel]");
    return (few_taps(w) || fails("its kernel has too many taps beside the image's borders")) &&
           (one_row(v_.bias) || fails("expected a bias of one row of channels"));
  }

  // Destinations near a border have taps of their own, of which the plan keeps a list (make_taps.cpp).
  bool few_taps(const int64_t* w) const {
    double runs = double(w[kKernelY]) * double(w[kKernelX]), scan = 0;
    for (const int axis : {0, 1}) {
      const double kernel = double(w[kKernelY + axis]), in = double(w[kHeight + axis]);
      const double out = double(w[kOutHeight + axis]), stride = double(w[kStrideY + axis]);
      const double near = 2 * double(w[kDilationY + axis]) * (kernel - 1) + 2 * double(w[kPadY + axis]) + stride + 1;
      runs *= std::min(std::max(in, out), near);
      scan += (in + out) * kernel;
    }
    return runs <= kMostTaps && scan <= double(int64_t(1) << 32);
  }

  const PlanStorage& plan_;
  const ValuePlan& v_;
  int64_t index_;
  const Why& why_;
};

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
    if (p[0] < kLinearWeight || p[0] > kStepRows)
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
    if (loss.kind < kMse || loss.kind > kL1 || loss.reduction < 0 || loss.reduction > 1)
      return why("expected a loss of kind 0 to 4 and reduction 0 or 1, got [%d, %d]", loss.kind, loss.reduction);
  if (spec.needs < 0 || spec.needs > 15) return why("expected needs from 0 to 15, got %d", spec.needs);
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
    if (!NodeCheck(plan, i, why).passes()) return false;
    if (v.op != kConv) continue;
    int64_t& known = taps[size_t(v.weight)];
    const int64_t own = v.window[kKernelY] * v.window[kKernelX];
    if (known && known != own) return why("node %lld (conv): its weight has another kernel elsewhere", Long(i));
    known = own;
  }
  if (!check_ids(plan, why)) return false;
  const ValuePlan& output = plan.values[plan.output];
  if (!output.batched) return why("expected an output of every sample, got one of parameters alone");
  const bool ids = plan.support_loss.kind == kCrossEntropy || plan.query_loss.kind == kCrossEntropy;
  if (ids && output.rows != 1)
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
