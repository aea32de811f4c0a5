// The operations one by one: what a node of each must look like, and what else the plan asks of them.
#include "inner_loop/plan/layers.h"

#include <algorithm>

#include "mtml/program.h"

namespace mtmlk {

using Long = long long;

// One node, and what to say of it.
struct NodeCheck {
  const PlanStorage& plan;
  const ValuePlan& v;
  int64_t index;
  const Why& why;
  const LayerTraits& traits;

  const ValuePlan& a() const { return plan.values[v.a]; }
  const ValuePlan& b() const { return plan.values[v.b]; }

  bool fails(const char* what) const {
    return why("node %lld (%s): %s (it gives %lld rows of %lld)", Long(index), traits.name, what, Long(v.rows),
               Long(v.features));
  }

  bool operand(int32_t value, bool reads) const { return reads ? value >= 0 && value < index : value < 0; }

  bool param(int32_t given, Reads reads) const {
    return given < (reads == Reads::kNever ? 0 : plan.n_params) && (reads != Reads::kAlways || given >= 0);
  }

  bool indices() const {
    if (!operand(v.a, traits.operands > 0))
      return fails("expected a to be an earlier node, or -1 where the operation reads none");
    if (!operand(v.b, traits.operands > 1))
      return fails("expected b to be an earlier node, or -1 where the operation reads none");
    if (!param(v.weight, traits.weight))
      return fails("expected weight to be a parameter, or -1 where the operation reads none");
    if (!param(v.bias, traits.bias))
      return fails("expected bias to be a parameter, or -1 where the operation reads none");
    return true;
  }

  bool kind() const {
    if (traits.kind == KindIn::kNowhere) return true;
    return (v.kind >= 0 && v.kind < (traits.kinds ? traits.kinds : plan.n_inputs)) || fails(traits.bad_kind);
  }

  bool like_a() const {
    if (v.rows == a().rows && v.features == a().features && v.batched == a().batched) return true;
    return fails("expected the rows and features of a");
  }

  bool one_row(int32_t given) const {
    if (given < 0) return true;
    const ParamPlan& p = plan.params[given];
    return p.cols == v.features && (p.layout == kStepRows || (p.layout == kRows && p.rows == 1));
  }
};

namespace {

constexpr double kMostTaps = double(1 << 26);  // runs of a convolution's plan, 24 bytes each

bool fits_input(const NodeCheck& n) {
  const ValuePlan& v = n.v;
  if (!v.batched || v.rows * v.features != n.plan.inputs[v.kind].size)
    return n.fails("expected as many elements as a sample of the input has");
  return true;
}

bool fits_param(const NodeCheck& n) {
  const ValuePlan& v = n.v;
  const ParamPlan& p = n.plan.params[v.weight];
  if (v.batched || p.layout != kRows || p.rows != v.rows || p.cols != v.features)
    return n.fails("expected the rows and columns of a plain parameter");
  return true;
}

bool fits_product(const NodeCheck& n, int64_t outputs, int64_t inputs, const char* otherwise) {
  const ValuePlan& v = n.v;
  const ParamPlan& w = n.plan.params[v.weight];
  if (w.layout != kLinearWeight || outputs != v.features || inputs != n.a().features) return n.fails(otherwise);
  if (v.rows != n.a().rows || v.batched != n.a().batched) return n.fails("expected the rows of a");
  return n.one_row(v.bias) || n.fails("expected a bias of one row of features");
}

bool fits_linear(const NodeCheck& n) {
  const ParamPlan& w = n.plan.params[n.v.weight];
  return fits_product(n, w.rows, w.cols, "expected a linear weight of [features, features of a]");
}

bool fits_linear_transposed(const NodeCheck& n) {
  const ParamPlan& w = n.plan.params[n.v.weight];
  return fits_product(n, w.cols, w.rows, "expected a linear weight of [features of a, features]");
}

bool fits_like_a(const NodeCheck& n) { return n.like_a(); }

// Every operand has the result's rows, or is one row that all samples share; and its features, or one.
bool fits_pair(const NodeCheck& n) {
  const ValuePlan& v = n.v;
  const auto fits = [&](const ValuePlan& x) {
    const bool rows = x.batched == v.batched ? x.rows == v.rows || (x.rows == 1 && !x.batched)
                                             : !x.batched && (x.rows == v.rows || x.rows == 1);
    return rows && (x.features == v.features || x.features == 1);
  };
  const bool whole =
      std::max(n.a().features, n.b().features) == v.features && v.batched == (n.a().batched || n.b().batched);
  if (!whole || std::max(n.a().rows, n.b().rows) != v.rows || !fits(n.a()) || !fits(n.b()))
    return n.fails("expected operands that broadcast to its rows and features");
  return true;
}

bool fits_cat(const NodeCheck& n) {
  const ValuePlan& v = n.v;
  const bool rows = n.a().rows == v.rows && n.b().rows == v.rows, batched = n.a().batched == v.batched;
  if (!rows || !batched || n.b().batched != v.batched || n.a().features + n.b().features != v.features)
    return n.fails("expected operands of its rows whose features add up to its own");
  return true;
}

bool fits_expand(const NodeCheck& n) {
  if (n.a().batched || n.a().rows != 1 || n.a().features != n.v.features || !n.v.batched)
    return n.fails("expected one row of as many features, from parameters alone, to repeat over the samples");
  return true;
}

bool fits_view(const NodeCheck& n) {
  if (n.a().batched != n.v.batched || n.a().rows * n.a().features != n.v.rows * n.v.features)
    return n.fails("expected as many elements as a has");
  return true;
}

bool fits_transpose(const NodeCheck& n) {
  if (n.v.rows != n.a().features || n.v.features != n.a().rows || n.v.batched != n.a().batched)
    return n.fails("expected a's rows and features in each other's place");
  return true;
}

bool fits_norm(const NodeCheck& n) {
  const ValuePlan& v = n.v;
  if (!v.batched || !n.like_a()) return n.fails("expected a value of every sample, with the rows and features of a");
  if (!(v.c1 >= 1 && v.c1 <= double(v.features)) || v.features % int64_t(v.c1) != 0)
    return n.fails("expected a number of groups that divides the features");
  return (n.one_row(v.weight) && n.one_row(v.bias)) || n.fails("expected a weight and a bias of one row of features");
}

bool fits_embedding(const NodeCheck& n) {
  const ValuePlan& v = n.v;
  const ParamPlan& table = n.plan.params[v.weight];
  if ((table.layout != kRows && table.layout != kLinearWeight) || table.cols != v.features)
    return n.fails("expected a table of rows of its features, or a linear weight");
  if (!v.batched || v.rows != n.plan.inputs[v.kind].size)
    return n.fails("expected a row for every id that a sample of the input has");
  return is_count(v.c0, -1, double(table.rows - 1)) ||
         n.fails("expected its padding id to be a row of the table, or -1");
}

bool fits_slice(const NodeCheck& n) {
  const ValuePlan& v = n.v;
  if (v.rows != n.a().rows || v.batched != n.a().batched) return n.fails("expected the rows of a");
  return (is_count(v.c0, 0, double(n.a().features - v.features)) && v.c1 == v.c0 + double(v.features)) ||
         n.fails("expected to begin and end inside the features of a");
}

bool window(const NodeCheck& n) {
  const ValuePlan& v = n.v;
  const int64_t* w = v.window;
  if (!v.batched || !n.a().batched || n.a().rows != w[kHeight] * w[kWidth] || v.rows != w[kOutHeight] * w[kOutWidth])
    return n.fails("expected images of every sample whose points are its window's height times width");
  return true;
}

bool fits_pool(const NodeCheck& n) {
  const ValuePlan& v = n.v;
  return window(n) && (v.features == n.a().features || n.fails("expected the features of a"));
}

// Destinations near a border have taps of their own, of which the plan keeps a list (make_taps.cpp).
bool few_taps(const int64_t* w) {
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

bool fits_conv(const NodeCheck& n) {
  const ValuePlan& v = n.v;
  if (!window(n)) return false;
  const ParamPlan& weight = n.plan.params[v.weight];
  const int64_t* w = v.window;
  const int64_t groups = w[kGroups], taps = w[kKernelY] * w[kKernelX];
  if (groups < 1 || v.features % groups != 0 || n.a().features % groups != 0)
    return n.fails("expected groups that divide the channels on both sides");
  if (weight.layout != kConvWeight || weight.rows != v.features || weight.cols / taps != n.a().features / groups ||
      weight.cols % taps != 0)
    return n.fails("expected a convolution's weight of [channels, channels of a / groups, kernel]");
  return (few_taps(w) || n.fails("its kernel has too many taps beside the image's borders")) &&
         (n.one_row(v.bias) || n.fails("expected a bias of one row of channels"));
}

// Linear layers and convolutions read their input element by element, so it needs no padding; narrow layers and
// grouped convolutions read vectors.
bool packed(const Plan& plan, const ValuePlan& v) { return !plan.params[v.weight].narrow; }
bool ungrouped(const Plan&, const ValuePlan& v) { return v.window[kGroups] == 1; }
bool always(const Plan&, const ValuePlan&) { return true; }

bool is_batch_norm(const ValuePlan& v) { return v.kind == kBatchNorm; }

constexpr KindIn kNoKind = KindIn::kNowhere, kInA = KindIn::kA, kInB = KindIn::kB;
constexpr Reads kNone = Reads::kNever, kMay = Reads::kMaybe, kMust = Reads::kAlways;

constexpr const char* kNoInput = "expected a to be an input of the program";

const LayerTraits kTraits[kOpCount] = {
    // in the order of Op: name, operands, kind, kinds, bad_kind, weight, bias, flags, fits, reads_elements, mixes
    {"input", 0, kInA, 0, kNoInput, kNone, kNone, kKeepsOutput, fits_input},
    {"param", 0, kNoKind, 0, nullptr, kMust, kNone, kKeepsOutput, fits_param},
    {"view", 1, kNoKind, 0, nullptr, kNone, kNone, kPlain, fits_view},
    {"linear", 1, kNoKind, 0, nullptr, kMust, kMay, kProducts, fits_linear, packed},
    {"act", 1, kInB, kActCount, "unknown activation", kNone, kNone, kKeepsOutput, fits_like_a},
    {"add", 2, kNoKind, 0, nullptr, kNone, kNone, kPlain, fits_pair},
    {"mul", 2, kNoKind, 0, nullptr, kNone, kNone, kPlain, fits_pair},
    {"cat", 2, kNoKind, 0, nullptr, kNone, kNone, kPlain, fits_cat},
    {"expand", 1, kNoKind, 0, nullptr, kNone, kNone, kPlain, fits_expand},
    {"affine", 1, kNoKind, 0, nullptr, kNone, kNone, kPlain, fits_like_a},
    {"transpose", 1, kNoKind, 0, nullptr, kNone, kNone, kPlain, fits_transpose, always},
    {"conv", 1, kNoKind, 0, nullptr, kMust, kMay, kWindowed | kProducts, fits_conv, ungrouped},
    {"norm", 1, kInB, kNormCount, "unknown normalisation", kMay, kMay, kPlain, fits_norm, nullptr, is_batch_norm},
    {"pool", 1, kInB, kPoolCount, "unknown pooling", kNone, kNone, kWindowed | kKeepsOutput, fits_pool},
    {"embedding", 0, kInA, 0, kNoInput, kMust, kNone, kNeedsConsts, fits_embedding},
    {"slice", 1, kNoKind, 0, nullptr, kNone, kNone, kNeedsConsts, fits_slice, always},
    {"softmax", 1, kInB, kSoftmaxCount, "unknown softmax", kNone, kNone, kKeepsOutput, fits_like_a},
    {"linear_transposed", 1, kNoKind, 0, nullptr, kMust, kMay, kProducts, fits_linear_transposed},
};

const LayerTraits kUnknown = {"unknown", 0, kNoKind, 0, nullptr, kNone, kNone, kPlain, nullptr};

}  // namespace

const LayerTraits& traits_of(int32_t op) { return op < 0 || op >= kOpCount ? kUnknown : kTraits[op]; }

bool check_node(const PlanStorage& plan, int64_t index, const Why& why) {
  const ValuePlan& v = plan.values[index];
  const NodeCheck node = {plan, v, index, why, traits_of(v.op)};
  if (!node.traits.fits) return why("node %lld: unknown operation %d", Long(index), v.op);
  if (v.rows < 1 || v.features < 1) return node.fails("expected at least one row and feature");
  return node.indices() && node.kind() && node.traits.fits(node);
}

}  // namespace mtmlk
