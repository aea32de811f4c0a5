// Decoding and layout of a plan. Everything here runs once per (program, shapes, options).
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "mtml/pointwise.h"
#include "mtml/update.h"
#include "inner_loop/plan/layers.h"
#include "inner_loop/plan/storage.h"

namespace mtmlk {

int count_uses(const Plan& plan, int32_t value) {
  int uses = plan.output == value;
  for (int64_t i = 0; i < plan.n_values; ++i)
    if (plan.values[i].live) uses += (plan.values[i].a == value) + (plan.values[i].b == value);
  return uses;
}

namespace {

constexpr int64_t kWidest = 16;  // lanes of any instruction set

int64_t param_room(const ParamPlan& p) {
  const int64_t as_rows = p.rows * round_up(p.cols, kWidest);
  const bool weight = p.layout == kLinearWeight || p.layout == kConvWeight;
  return weight ? std::max(as_rows, p.cols * round_up(p.rows, kWidest)) : as_rows;
}

int64_t padded_row(const Plan& plan, int64_t features) { return round_up(features, plan.lanes); }

bool decode_node(PlanStorage& plan, const MtmlkPlanSpec& spec, const int64_t* p, const Why& why) {
  for (int c = 0; c < kNodeInts; ++c)
    if (p[c] < -1 || p[c] > INT32_MAX)
      return why("node %zu: expected numbers from -1 to 2^31, got %lld", plan.value_store.size(), (long long)p[c]);
  ValuePlan v = {};
  v.self = int32_t(plan.value_store.size());
  v.op = int32_t(p[0]), v.a = int32_t(p[1]), v.b = int32_t(p[2]), v.weight = int32_t(p[3]), v.bias = int32_t(p[4]);
  v.rows = p[5], v.features = p[6], v.batched = p[7] != 0;
  const LayerTraits& traits = traits_of(v.op);
  if (traits.kind == KindIn::kB) v.kind = v.b, v.b = -1;
  if (traits.kind == KindIn::kA) v.kind = v.a, v.a = -1;
  v.c0 = 1;
  const bool window = traits.flags & kWindowed;
  const int64_t count = window ? int64_t(kWindowConsts) : 2;
  if (p[8] < 0 ? window || (traits.flags & kNeedsConsts) : p[8] + count > spec.n_consts)
    return why("node %zu: expected %lld constants from position %lld of consts, which has %lld",
               plan.value_store.size(), (long long)count, (long long)p[8], (long long)spec.n_consts);
  if (p[8] >= 0) v.c0 = spec.consts[p[8]], v.c1 = spec.consts[p[8] + 1];
  if (window) {
    if (!check_window(spec.consts + p[8], why)) return false;
    plan.windows.push_back(std::make_unique<std::array<int64_t, kWindowConsts>>());
    for (int64_t c = 0; c < kWindowConsts; ++c) (*plan.windows.back())[size_t(c)] = int64_t(spec.consts[p[8] + c]);
    v.window = plan.windows.back()->data();
  }
  plan.value_store.push_back(v);
  return true;
}

bool decode(PlanStorage& plan, const MtmlkPlanSpec& spec, const Why& why) {
  if (!check_header(spec, why)) return false;
  const int64_t* p = spec.program;
  plan.n_inputs = p[1], plan.n_params = p[2], plan.n_values = p[3], plan.output = int32_t(p[4]);
  p += kHeaderInts;
  for (int64_t i = 0; i < plan.n_inputs; ++i, ++p) plan.input_store.push_back({p[0], 0, false});
  for (int64_t i = 0; i < plan.n_params; ++i, p += kParamInts) {
    ParamPlan param = {};
    param.in_out = p[0] == kInOutWeight;
    param.layout = param.in_out ? int32_t(kLinearWeight) : int32_t(p[0]), param.rows = p[1], param.cols = p[2];
    param.adapted = spec.adapted[i] != 0;
    // Up to a quarter of a vector: padded columns would waste 3/4 of two products, dot products waste their sums.
    param.narrow = param.layout == kLinearWeight && param.rows * 4 <= plan.lanes;
    param.taps = 1;
    plan.param_store.push_back(param);
  }
  for (int64_t i = 0; i < plan.n_values; ++i, p += kNodeInts)
    if (!decode_node(plan, spec, p, why)) return false;
  int64_t nth = 0;
  for (ParamPlan& param : plan.param_store) {
    param.starts = param.adapted && spec.starts && spec.starts[nth] != 0;
    plan.starts |= param.starts;
    nth += param.adapted;
  }
  plan.values = plan.value_store.data(), plan.params = plan.param_store.data(), plan.inputs = plan.input_store.data();
  if (!check_program(plan, why) || !check_sizes(plan, spec, why)) return false;
  for (ValuePlan& v : plan.value_store)
    if (v.op == kLinearTransposed) plan.params[v.weight].narrow = false;
  for (ValuePlan& v : plan.value_store)
    if (v.op == kConv) plan.params[v.weight].taps = v.window[kKernelY] * v.window[kKernelX];
  mark_ids(plan);
  return true;
}

void mark_live(Plan& plan) {
  plan.values[plan.output].live = true;
  for (int64_t i = plan.n_values - 1; i >= 0; --i) {
    ValuePlan& v = plan.values[i];
    if (!v.live) continue;
    if (v.a >= 0) plan.values[v.a].live = true;
    if (v.b >= 0) plan.values[v.b].live = true;
    if (v.weight >= 0) plan.params[v.weight].used = true;
    if (v.bias >= 0) plan.params[v.bias].used = true;
    const LayerTraits& traits = traits_of(v.op);
    plan.mixes |= traits.mixes && traits.mixes(v);
  }
}

void mark_dependence(Plan& plan) {
  const bool want_params = plan.needs & MTMLK_NEED_PARAMS;
  const bool want_inputs = plan.needs & (MTMLK_NEED_SUPPORT_X | MTMLK_NEED_QUERY_X);
  for (int64_t i = 0; i < plan.n_params; ++i) {
    ParamPlan& p = plan.params[i];
    p.meta = want_params || p.adapted;
  }
  for (int64_t i = 0; i < plan.n_values; ++i) {
    ValuePlan& v = plan.values[i];
    v.meta = v.op == kInput && want_inputs;
    for (const int32_t operand : {v.a, v.b})
      if (operand >= 0) {
        v.tan |= plan.values[operand].tan;
        v.meta |= plan.values[operand].meta;
      }
    for (const int32_t param : {v.weight, v.bias})
      if (param >= 0) {
        v.tan |= plan.params[param].adapted;
        v.meta |= plan.params[param].meta;
      }
    if (v.op == kLinear && plan.values[v.a].meta) plan.params[v.weight].transposed = !plan.params[v.weight].narrow;
    if (v.op == kLinearTransposed) plan.params[v.weight].transposed = true;
    if (v.op == kConv && plan.values[v.a].meta) plan.params[v.weight].transposed |= v.window[kGroups] == 1;
  }
}

// Such a value needs no padding.
bool only_elements_read(const Plan& plan, int32_t value) {
  if (plan.output == value) return false;
  for (int64_t i = 0; i < plan.n_values; ++i) {
    const ValuePlan& v = plan.values[i];
    if (!v.live || (v.a != value && v.b != value)) continue;
    const LayerTraits& traits = traits_of(v.op);
    if (!traits.reads_elements || !traits.reads_elements(plan, v)) return false;
  }
  return true;
}

// An activation may overwrite its input's plane where nothing else reads it. Another activation does: its derivatives
// come from its own output.
int32_t act_mode(const Plan& plan, const ValuePlan& v) {
  const bool keeps = traits_of(plan.values[v.a].op).flags & kKeepsOutput;
  const bool alone = count_uses(plan, v.a) == 1 && v.batched && !keeps;
  return alone && !v.in_chain ? best_act_mode(v.kind, v.c0) : kKeepInput;
}

// relu's second derivative is 0: neither its input's delta nor the output's is needed once the other is known. At the
// program's output the loss's gradient is read again (seeds of the support losses): there only relu, which changes it
// once and for all.
bool shares_deltas(const Plan& plan, const ValuePlan& v) {
  if (v.op != kAct || v.act_mode != kInPlace) return false;
  return v.kind == kRelu || (v.kind == kLeakyRelu && &v != &plan.values[plan.output]);
}

void mark_gates(Plan& plan) {
  for (int64_t i = 0; i < plan.n_values; ++i) {
    ValuePlan& relu = plan.values[i];
    if (!relu.live || relu.op != kAct || relu.kind != kRelu || relu.act_mode != kInPlace) continue;
    ValuePlan& before = plan.values[relu.a];
    if (before.op == kLinear && !plan.params[before.weight].narrow) before.gate_output = relu.gated_before = true;
    if (count_uses(plan, int32_t(i)) != 1) continue;
    for (int64_t j = i + 1; j < plan.n_values; ++j) {
      ValuePlan& after = plan.values[j];
      if (after.live && after.op == kLinear && after.a == i) after.gate_input = relu.gated_after = true;
    }
  }
}

// Values inside a normalisation's chain exist nowhere but in registers.
bool has_no_planes(const Plan& plan, int32_t value) {
  const ValuePlan& v = plan.values[value];
  if (v.op == kNorm && v.norm) return v.norm->tail != value;
  return v.in_chain && v.norm->tail != value;
}

// Nothing is stored of a gradient that nobody asks for, nor of a tangent that is zero. The loss always writes the
// gradient of the output, which an activation in place shares with its input.
bool has_plane(const Plan& plan, const ValuePlan& v, Plane plane) {
  if (plane == kPrimal) return !v.direct_input;
  if (plane == kTangent) return v.tan;
  const ValuePlan& output = plan.values[plan.output];
  return (v.meta && !v.streamed) || &v == &output || (output.op == kAct && &v == &plan.values[output.a]);
}

void place_values(Plan& plan) {
  for (int64_t i = 0; i < plan.n_values; ++i) {
    ValuePlan& v = plan.values[i];
    if (!v.live) continue;
    v.direct_input = v.op == kInput && only_elements_read(plan, int32_t(i));
    const bool dense = v.op == kTranspose && v.batched && !v.tan && only_elements_read(plan, int32_t(i));
    v.ld = padded_row(plan, v.features);
    v.ld_primal = v.direct_input || dense ? v.features : v.ld;
    if (v.op == kAct) v.act_mode = act_mode(plan, v);
    if (v.op == kNorm) place_norm(plan, v);
    v.remade = is_remade(plan, v);
    if (has_no_planes(plan, int32_t(i))) continue;
    const bool in_place = v.op == kAct && v.act_mode == kInPlace;
    int64_t* sizes = v.batched ? plan.plane_size : plan.fixed_size;
    for (int plane = 0; plane < kPlanes; ++plane) {
      const bool is_delta = plane == kDelta || plane == kDeltaTangent;
      if (in_place && (!is_delta || shares_deltas(plan, v))) {
        v.offset[plane] = plan.values[v.a].offset[plane];
      } else if (plane == kPrimal && v.remade) {
        plan.remade_size += v.rows * v.ld;
      } else if (has_plane(plan, v, Plane(plane))) {
        v.offset[plane] = sizes[plane];
        sizes[plane] += round_up(v.rows * (plane == kPrimal ? v.ld_primal : v.ld), plan.lanes);
      }
    }
  }
  for (int64_t i = 0; i < plan.n_values; ++i) {
    ValuePlan& v = plan.values[i];
    if (!v.remade) continue;
    v.offset[kPrimal] = plan.plane_size[kPrimal];
    plan.plane_size[kPrimal] += v.rows * v.ld;
  }
}

// Gradients are written in reverse order of the nodes, batched ones first: the first writer stores, later ones add.
void mark_first_writers(Plan& plan) {
  std::vector<bool> value_written(size_t(plan.n_values)), param_written(size_t(plan.n_params));
  const auto written = [](std::vector<bool>& seen, int32_t i) {
    const bool before = i >= 0 && seen[size_t(i)];
    if (i >= 0) seen[size_t(i)] = true;
    return before;
  };
  for (const bool batched : {true, false})
    for (int64_t i = plan.n_values - 1; i >= 0; --i) {
      ValuePlan& v = plan.values[i];
      // a streamed convolution runs in the place of the normalisation after it, the rest of a chain as well
      if (!v.live || v.batched != batched || v.streamed || v.in_chain) continue;
      ValuePlan* conv = v.op == kNorm && v.norm && v.norm->streamed ? &plan.values[v.a] : nullptr;
      if (conv) {
        conv->add_a = written(value_written, conv->a);
        conv->add_weight = written(param_written, conv->weight);
        conv->add_bias = written(param_written, conv->bias);
      }
      v.add_a = written(value_written, v.a) || (v.a >= 0 && !plan.values[v.a].batched);
      v.add_b = written(value_written, v.b) || (v.b >= 0 && !plan.values[v.b].batched);
      v.add_weight = written(param_written, v.weight);
      v.add_bias = written(param_written, v.bias);
    }
}

void place_param(Plan& plan, ParamPlan& p) {
  const bool packed = (p.layout == kLinearWeight && !p.narrow) || p.layout == kConvWeight;
  p.size = packed ? p.cols * round_up(p.rows, plan.lanes) : p.rows * padded_row(plan, p.cols);
  p.size_t_ = packed && p.transposed ? p.taps * p.rows * round_up(p.cols / p.taps, plan.lanes) : 0;
  p.full = plan.full_size, p.full_t = plan.full_t_size;
  plan.full_size += p.size, plan.full_t_size += p.size_t_;
  if (!p.stepped) return;
  p.own = plan.own_size, p.own_t = plan.own_t_size;
  plan.own_size += p.size, plan.own_t_size += p.size_t_;
}

void place_params(Plan& plan) {
  for (const bool low : {false, true}) {
    for (int64_t i = 0; i < plan.n_params; ++i)
      if (plan.params[i].low == low) place_param(plan, plan.params[i]);
    if (!low) plan.lambda_size = plan.full_size;
  }
  for (int64_t i = 0; i < plan.n_params; ++i) {
    ParamPlan& p = plan.params[i];
    p.lr = !p.adapted ? -1 : plan.n_lr == 1 ? 0 : int32_t(plan.n_adapted);
    plan.n_adapted += p.adapted;
  }
}

void place_rates(PlanStorage& plan, const MtmlkPlanSpec& spec) {
  int64_t carry = plan.lambda_size;
  plan.hyper_at = carry;
  if (plan.needs & MTMLK_NEED_HYPER) carry += round_up(kHyperCount, plan.lanes);
  const int64_t before = carry;
  for (int64_t i = 0; i < plan.n_lr; ++i) {
    LrPlan lr = {};
    lr.steps = spec.lr_steps[i], lr.elements = spec.lr_elements[i] != 0, lr.size = 1, lr.param = -1;
    for (int64_t p = 0; p < plan.n_params; ++p)
      if (plan.params[p].adapted && plan.params[p].lr == i && (plan.n_lr > 1 || plan.n_adapted == 1))
        lr.param = int32_t(p);
    if (lr.elements) lr.size = plan.params[lr.param].size;
    lr.packed = plan.lr_size, lr.carry = carry;
    plan.lr_size += round_up(lr.steps * lr.size, plan.lanes);
    carry += round_up(lr.steps * lr.size, plan.lanes);
    plan.lr_store.push_back(lr);
  }
  plan.lrs = plan.lr_store.data();
  plan.carry_cols = plan.carry_end = (plan.needs & MTMLK_NEED_LR) ? carry : before;
  plan.moments_at = plan.carry_cols;
  if (plan.needs & MTMLK_NEED_MOMENTS)
    plan.carry_cols = plan.carry_end = plan.moments_at + plan.n_moments * plan.own_size;
  for (int64_t i = 0; i < plan.n_params; ++i) {
    ParamPlan& p = plan.params[i];
    if (!p.low) continue;
    p.low_at = plan.carry_end;
    plan.carry_end += p.size;
  }
}

// torch.compile keeps compiled graphs on disk, sizes and all: the carry's must not depend on the machine's vectors.
int64_t carry_room(const Plan& plan) {
  int64_t room = params_room(plan);
  if (plan.needs & MTMLK_NEED_HYPER) room += round_up(kHyperCount, kWidest);
  for (int64_t i = 0; (plan.needs & MTMLK_NEED_MOMENTS) && i < plan.n_params; ++i)
    if (plan.params[i].adapted) room += plan.n_moments * param_room(plan.params[i]);
  for (int64_t i = 0; (plan.needs & MTMLK_NEED_LR) && i < plan.n_lr; ++i) {
    const LrPlan& lr = plan.lrs[i];
    room += round_up(lr.steps * (lr.elements ? param_room(plan.params[lr.param]) : 1), kWidest);
  }
  return room;
}

// Multiply-adds of a sample in one node; ten for an element of what is no product.
double node_work(const Plan& plan, const ValuePlan& v) {
  const double outputs = double(v.rows) * double(v.features);
  return outputs * (traits_of(v.op).flags & kProducts ? double(plan.params[v.weight].cols) : 10.0);
}

// How many rows a sample has for its weights, on average over their elements: a convolution's positions, 1 for a linear
// layer. Chunks are paid by elements of the gradient: images of 784 rows before 582 000 weights of linear layers are few.
double rows_of_weights(const Plan& plan, int64_t otherwise) {
  double products = 0, weights = 0;
  for (int64_t i = 0; i < plan.n_values; ++i) {
    const ValuePlan& v = plan.values[i];
    if (!v.live || !v.batched || !(traits_of(v.op).flags & kProducts)) continue;
    products += node_work(plan, v), weights += node_work(plan, v) / double(v.rows);
  }
  return weights > 0 ? products / weights : double(otherwise);
}

// Rows of a block from which on products take more from planes than from weights [rows, cols] and their gradients, which
// every block reads again, on average over the multiply-adds: 32 of 64 x 64, 256 of 512 x 512.
double rows_to_outweigh(const Plan& plan) {
  double products = 0, weighed = 0;
  for (int64_t i = 0; i < plan.n_values; ++i) {
    const ValuePlan& v = plan.values[i];
    if (!v.live || !v.batched || !(traits_of(v.op).flags & kProducts)) continue;
    const ParamPlan& w = plan.params[v.weight];
    products += node_work(plan, v);
    weighed += node_work(plan, v) * double(w.rows * w.cols) / double(w.rows + w.cols);
  }
  return products > 0 ? weighed / products : 0;
}

// Rows are cut so that a block's planes stay in the second-level cache, or outweigh its weights; chunks only where a task
// has many rows, since each costs a gradient buffer (256 rows make the buffer's sum under 3 % of the products).
Cut cut_rows(const Plan& plan, int64_t samples) {
  constexpr int64_t kBlockBytes = 192 << 10, kChunkRows = 256, kMaxChunks = 16, kMinBlockRows = 48;
  const int64_t bytes = element_bytes(plan.dtype);
  int64_t sample = 0;
  for (const int64_t size : plan.plane_size) sample += size;
  int64_t rows = 1;
  for (int64_t i = 0; i < plan.n_values; ++i)
    if (plan.values[i].live && plan.values[i].batched) rows = std::max(rows, plan.values[i].rows);
  Cut cut = {samples, 1, 1, samples};
  if (samples == 0 || plan.mixes || plan.low_rank) return cut;
  const double weighed = rows_of_weights(plan, rows);
  cut.chunks = std::clamp<int64_t>(int64_t(double(samples) * weighed) / kChunkRows, 1, std::min(kMaxChunks, samples));
  const int64_t chunk = (samples + cut.chunks - 1) / cut.chunks;
  const double least = std::max<double>(kMinBlockRows, rows_to_outweigh(plan));
  const int64_t fit = std::max(kBlockBytes / std::max<int64_t>(sample * bytes, 1), int64_t(std::ceil(least / weighed)));
  cut.blocks = (chunk + fit - 1) / fit;
  cut.block_samples = (chunk + cut.blocks - 1) / cut.blocks;
  return cut;
}

// Of a forward pass, a sample.
double sample_work(const Plan& plan) {
  double work = 0;
  for (int64_t i = 0; i < plan.n_values; ++i)
    if (plan.values[i].live && plan.values[i].batched) work += node_work(plan, plan.values[i]);
  return work;
}

void place_state(Plan& plan) {
  const int64_t bytes = element_bytes(plan.dtype);
  const bool second_order = plan.needs != 0 && !plan.first_order;
  const int64_t aux = plan.out_rows * plan.out_ld;
  const int64_t planes = plan.plane_size[kPrimal] + plan.plane_size[kDelta] + aux;
  const int64_t block_planes = planes * plan.support.block_samples * plan.support.blocks * plan.support.chunks;
  plan.state_grad = plan.own_size + plan.own_t_size;
  plan.state_moments = plan.state_grad + (keeps_gradients(plan) ? plan.own_size : 0);
  plan.state_fixed = plan.state_moments + plan.n_moments * plan.own_size;
  plan.state_blocks = plan.state_fixed + plan.fixed_size[kPrimal] + plan.fixed_size[kDelta];
  // Above 16 MiB a task, reading the planes back costs more than computing them again, forward and back to the inputs.
  // Convolutions compute more an element: mini_conv keeps 55 MiB, whose reading takes a tenth of what they would take to
  // make. So do linear layers from 128 columns on, where steps need not be run again for it: 40 MiB of them take 0.85 of
  // the time with 256 columns, 0.95 with 64 (Zen 5).
  constexpr int64_t kFew = int64_t(16) << 20, kMany = int64_t(128) << 20;
  constexpr double kDear = 96;  // multiply-adds an element
  const bool few = plan.steps * block_planes * bytes <= (plan.heavy ? kMany : kFew);
  const bool dear = !few && 2 * sample_work(plan) >= kDear * double(planes) &&
                    plan.steps * (plan.state_blocks + block_planes) * bytes <= kMany;
  plan.keep_planes = second_order && (few || dear);
  plan.state_size = plan.state_blocks + (plan.keep_planes ? block_planes : 0);
  // Above 64 MiB a task, only every sqrt(K)-th step is kept and the steps between are recomputed.
  plan.slots = std::max<int64_t>(plan.steps, 1);
  const int64_t most = plan.heavy || dear ? kMany : int64_t(64) << 20;
  if (plan.needs == 0) {
    plan.slots = std::min<int64_t>(plan.slots, 2);
  } else if (plan.steps * plan.state_size * bytes > most) {
    plan.slots = 1;
    while (plan.slots * plan.slots < plan.steps) ++plan.slots;
  }
  // tangents are taken of the support set only
  const int64_t tangents = plan.needs != 0 ? plan.plane_size[kTangent] + plan.plane_size[kDeltaTangent] : 0;
  plan.transient_size = std::max(plan.query.block_samples * (planes - plan.remade_size),
                                 plan.support.block_samples * ((plan.keep_planes ? 0 : planes) + tangents));
  plan.chunk_size = plan.lambda_size + plan.fixed_size[kDelta] + plan.fixed_size[kDeltaTangent];
  plan.fused_update =
      plan.support.chunks == 1 && plan.support.blocks == 1 && plan.plain && !(plan.needs & MTMLK_NEED_LR);
  for (int64_t i = 0; i < plan.n_lr; ++i) plan.fused_update &= !plan.lrs[i].elements;
  if (plan.low_rank) place_low_state(plan);
}

void count_work(Plan& plan) {
  constexpr double kWatched = 1 << 20;  // a pass over one set of a task that takes 30 us at the least
  const double sample = sample_work(plan), support = sample * double(plan.support.samples);
  const double query = sample * double(plan.query.samples);
  plan.watched = std::max(support, query) >= kWatched;
  // Forward, and backward to inputs and to weights; along a tangent each of them has two products.
  const double step = plan.needs == 0 || plan.first_order ? 3 : 9;
  plan.task_work = step * double(plan.steps) * support + 3 * double(plan.query_steps ? plan.steps + 1 : 1) * query;
}

// A group has one sum of the carry: four small tasks, for which sums would otherwise be as much work as a part of them,
// else one (four of mini_conv's are half a second), while there is room.
int64_t group_size(const Plan& p, int64_t tasks) {
  constexpr double kSmall = 1 << 22, kRoom = 256 << 20;  // multiply-adds; bytes
  if (p.carry_per_task || p.heavy || p.low_rank) return 1;
  const double sums = double(tasks) * double(p.carry_cols) * double(element_bytes(p.dtype));
  return p.task_work >= kSmall && sums <= kRoom ? 1 : 4;
}

}  // namespace

int64_t params_room(const Plan& plan) {
  int64_t room = 0;
  for (int64_t i = 0; i < plan.n_params; ++i) room += param_room(plan.params[i]);
  return room;
}

Split split_tasks(const Plan& p, int64_t tasks, int threads) {
  Split split = {};
  split.group = group_size(p, tasks);
  split.groups = (tasks + split.group - 1) / split.group;
  split.seats = int(std::min<int64_t>(split.groups, threads));
  const int64_t shares = p.mixes ? threads : std::max(p.support.chunks, p.query.chunks);
  split.workers = int(std::min<int64_t>(threads / split.seats, shares));
  return split;
}

int create_plan(const MtmlkPlanSpec& spec, int lanes, Plan** out, MtmlkReason* reason) {
  auto plan = std::make_unique<PlanStorage>();
  plan->dtype = spec.dtype, plan->lanes = lanes;
  plan->steps = spec.steps, plan->first_order = spec.first_order != 0;
  plan->needs = spec.needs, plan->keep = spec.keep;
  plan->support_loss = spec.support_loss, plan->query_loss = spec.query_loss;
  plan->n_lr = spec.n_lr;
  plan->rule = spec.rule, plan->rule_flags = spec.rule_flags, plan->taken = spec.taken;
  plan->plain = spec.rule == kSgd && spec.rule_flags == 0;
  plan->n_moments = update_moments(spec.rule, spec.rule_flags);
  plan->query_steps = spec.query_steps != 0, plan->tasks_apart = spec.tasks_apart != 0;
  plan->support_sets = spec.per_step ? std::max<int64_t>(spec.steps, 1) : 1;
  if (!decode(*plan, spec, Why(reason))) return MTMLK_BAD_PROGRAM;
  mark_live(*plan);
  mark_dependence(*plan);
  mark_chains(*plan);
  place_values(*plan);
  mark_low_rank(*plan, spec);
  if (spec.form == MTMLK_LOW_RANK && !plan->low_rank) return MTMLK_NO_LOW_RANK;
  mark_gates(*plan);
  mark_first_writers(*plan);
  place_params(*plan);
  place_images(*plan);
  place_rates(*plan, spec);
  const ValuePlan& output = plan->values[plan->output];
  plan->out_rows = output.rows, plan->out_features = output.features, plan->out_ld = output.ld;
  plan->out_size = output.rows * output.features;
  plan->support = cut_rows(*plan, spec.support);
  plan->query = cut_rows(*plan, spec.query);
  count_work(*plan);
  place_scratch(*plan);
  place_state(*plan);
  // A row a task lets the backward pass weigh tasks freely; beyond 64 KiB a row only the sum over the tasks is kept.
  const int64_t bytes = element_bytes(plan->dtype);
  plan->carry_room = carry_room(*plan);
  plan->carry_per_task = plan->carry_room * bytes <= kTaskCarryBytes && !plan->low_rank;
  if (plan->starts || plan->tasks_apart || (plan->needs & MTMLK_NEED_MOMENTS)) plan->carry_per_task = true;
  *out = plan.release();
  return MTMLK_OK;
}

void destroy_plan(Plan* plan) { delete static_cast<PlanStorage*>(plan); }

}  // namespace mtmlk
