// The passes of one task: see task.h for the recursion.
#pragma once

#include <stdint.h>

#include "simd/layout.h"
#include "simd/simd.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/elementwise.h"
#include "layers/params.h"
#include "layers/table.h"
#include "inner_loop/factors.h"
#include "inner_loop/loss.h"
#include "inner_loop/runner.h"

namespace mtmlk {
namespace {

template <class T>
void Runner<T>::carve(Carver& c, const Plan& p, int worker_count) {
  const int64_t chunks = p.support.chunks > p.query.chunks ? p.support.chunks : p.query.chunks;
  states = p.low_rank ? nullptr : c.take<T>(p.slots * p.state_size);
  const bool marks = p.needs && p.slots < p.steps;
  checkpoints =
      marks ? c.take<T>((p.steps / p.slots + 1) * (p.own_size + p.own_t_size + p.n_moments * p.own_size)) : nullptr;
  lambda = c.take<T>(p.carry_cols);
  direction = c.take<T>(p.own_size + p.own_t_size);
  for (int i = 0; i < 2; ++i) {
    fixed_query[i] = c.take<T>(p.fixed_size[i]);
    fixed_tangent[i] = c.take<T>(p.fixed_size[kTangent + i]);
  }
  chunk_grads = c.take<T>(chunks * p.chunk_size);
  coef[0] = c.take<T>(p.support_sets * p.support.samples);
  start = p.starts ? c.take<T>(p.own_size + p.own_t_size) : nullptr;
  for (T*& plane : moments) plane = p.n_moments ? c.take<T>(p.n_moments * p.own_size) : nullptr;
  clip = p.rule_flags & kUpdateClipped ? c.take<T>(p.steps) : nullptr;
  coef[1] = c.take<T>(p.query.samples);
  const bool weighs = p.needs & (MTMLK_NEED_SUPPORT_MASK | MTMLK_NEED_QUERY_MASK);
  const int64_t most = p.support.samples > p.query.samples ? p.support.samples : p.query.samples;
  each_sample = weighs ? c.take<T>(most) : nullptr;
  negative_rate = c.take<T>(p.n_params);
  chunk_loss = c.take<double>(chunks);
  now = c.take<ParamPtr<T>>(p.n_params);
  along = c.take<ParamPtr<T>>(p.n_params);
  inputs = p.low_rank ? nullptr : c.take<const T*>(worker_count * p.n_inputs);
  if (p.low_rank) {
    negative_rates = c.take<T>(p.steps * p.n_params);
    factors = c.take<Factor<T>>(p.steps + 1 + 2 * p.steps);
    low = {factors,    factors + p.steps,      0,
           0,          c.take<T>(p.gram_size), c.take<T>(p.steps * 2 * p.n_params * p.kept_size),
           p.kept_size};
  }
  workers = c.take<Worker<T>>(worker_count);
  for (int w = 0; w < worker_count; ++w) {
    // where samples are mixed, the workers share the nodes of one block
    Worker<T> one = {c.take<T>(p.mixes && w ? 0 : p.transient_size), c.take<T>(p.mixes && w ? 0 : p.scratch_size),
                     p.mixes && w ? nullptr : c.take<T>((p.mixes ? worker_count : 1) * p.worker_scratch_size),
                     c.take<T*>(p.n_params), c.take<const T*>(p.n_params)};
    if (c.base) workers[w] = one;
  }
}

template <class T>
typename Runner<T>::Phase Runner<T>::support(int64_t k) const {
  const T* weights = coef[0] + (plan->support_sets == 1 ? 0 : k * plan->support.samples);
  return {false,
          &plan->support,
          plan->support_loss,
          call->support_x,
          call->support_y,
          weights,
          set_of_step(*plan, task, k),
          call->support_mask,
          call->grad_support_y,
          call->grad_support_mask};
}

template <class T>
typename Runner<T>::Phase Runner<T>::query() const {
  return {true,    &plan->query, plan->query_loss, call->query_x,      call->query_y,
          coef[1], task,         call->query_mask, call->grad_query_y, call->grad_query_mask};
}

template <class T>
T Runner<T>::step_weight(int64_t k) const {
  if (plan->query_steps) return T(1);
  return call->step_weights ? static_cast<const T*>(call->step_weights)[k] : T(k == plan->steps);
}

template <class T>
const T* Runner<T>::theta(int64_t k) const {
  if (k == 0) return nullptr;
  if (segmented() && k % plan->slots == 0) return checkpoints + k / plan->slots * set_size();
  return state(k - 1);
}

// Which row of a parameter with rows for the steps is read: support step k reads row k, the query set after k steps the
// row of the last of them; rows that are missing are the last one.
template <class T>
int64_t Runner<T>::step_row(const ParamPlan& p, int64_t k, bool query) const {
  if (p.layout != kStepRows) return 0;
  const int64_t row = query && k > 0 ? k - 1 : k;
  return row < p.rows ? row : p.rows - 1;
}

template <class T>
void Runner<T>::point_to(int64_t k, bool query) {
  const T* own = theta(k);
  low.n_theta = k;
  for (int64_t i = 0; i < plan->n_params; ++i) {
    const ParamPlan& p = plan->params[i];
    const T* from = own && p.stepped ? own : p.starts ? start : nullptr;
    now[i] = from ? ParamPtr<T>{from + p.own, from + plan->own_size + p.own_t} : shared->base[i];
    now[i].value += step_row(p, k, query) * (p.size / p.rows);
  }
}

// Where the gradient of parameter i goes in a buffer like lambda. Low weights' gradients stay in their factors.
template <class T>
T* Runner<T>::gradient_of(T* base, int64_t i, int64_t k, bool query) const {
  const ParamPlan& p = plan->params[i];
  return p.meta && !p.low ? base + p.full + step_row(p, k, query) * (p.size / p.rows) : nullptr;
}

template <class T>
const T* Runner<T>::rate(const ParamPlan& p, int64_t k) const {
  const LrPlan& lr = plan->lrs[p.lr];
  return shared->rates + lr.packed + (lr.steps == 1 ? 0 : k * lr.size);
}

// The mask of a sample; an ignored label counts 0.
template <class T>
T Runner<T>::sample_weight(const Phase& p, int64_t sample) const {
  const int64_t at = p.set * p.cut->samples + sample;
  if (p.loss.kind == kCrossEntropy && p.y && static_cast<const int64_t*>(p.y)[at] < 0) return T(0);
  return p.mask ? static_cast<const T*>(p.mask)[at] : T(1);
}

// What a mask of 1 counts in the task's loss: 1, or for a mean 1 over the masks' sum and a sample's elements, 0 where
// that sum is.
template <class T>
double Runner<T>::unit_weight(const Phase& p, double* total) const {
  *total = 0;
  for (int64_t i = 0; i < p.cut->samples; ++i) *total += double(sample_weight(p, i));
  if (p.loss.reduction == 1) return 1;
  const double elements = is_of_classes(p.loss.kind) ? 1 : double(plan->out_size);
  return *total == 0 ? 0 : 1 / (*total * elements);
}

template <class T>
void Runner<T>::sample_weights(const Phase& p, T* out) const {
  double total;
  const T unit = T(unit_weight(p, &total));
  for (int64_t i = 0; i < p.cut->samples; ++i) out[i] = total == 0 && unit == 0 ? T(0) : sample_weight(p, i) * unit;
}

// body(chunk, worker); workers split the chunks, which never depend on how many workers there are.
template <class T>
template <class Body>
void Runner<T>::each_chunk(const Cut& cut, Body body) {
  each_piece(shared->workers, cut.chunks, plan->watched ? watch : nullptr, body);
}

MTMLK_INLINE int64_t chunk_samples(const Cut& cut) { return (cut.samples + cut.chunks - 1) / cut.chunks; }

template <class T>
Block<T> Runner<T>::block(const Phase& phase, int64_t chunk, int64_t index, int worker, int64_t k, bool kept) {
  const Cut& cut = *phase.cut;
  const int64_t start = chunk * chunk_samples(cut) + index * cut.block_samples;
  int64_t end = start + cut.block_samples;
  if (end > (chunk + 1) * chunk_samples(cut)) end = (chunk + 1) * chunk_samples(cut);
  if (end > cut.samples) end = cut.samples;
  Block<T> b = {};
  if (plan->low_rank) {
    const int64_t pass = phase.query ? plan->steps : k;
    b = passes[pass] = pass_of<T>(*plan, *call, states, task, pass, inputs + pass * plan->n_inputs);
    b.low = &low;
  }
  b.plan = plan, b.samples = end > start ? end - start : 0, b.stride = cut.block_samples;
  b.params = now, b.direction = along, b.tangent = false, b.remake = phase.query;
  b.workers = plan->mixes ? shared->workers : 1, b.watch = plan->watched ? watch : nullptr;
  b.scratch = workers[worker].scratch, b.own = workers[worker].own;
  T* chunk_fixed = chunk_grads + chunk * plan->chunk_size + plan->lambda_size;
  b.fixed[kPrimal] = phase.query ? fixed_query[0] : state(k) + plan->state_fixed;
  b.fixed[kDelta] = chunk_fixed;
  b.fixed[kTangent] = fixed_tangent[0];
  b.fixed[kDeltaTangent] = chunk_fixed + plan->fixed_size[kDelta];
  if (plan->low_rank) return b;
  b.inputs = inputs + worker * plan->n_inputs;
  for (int64_t i = 0; i < plan->n_inputs; ++i)
    inputs[worker * plan->n_inputs + i] = input_at<T>(plan->inputs[i], phase.x[i], phase.set * cut.samples + start);
  const int64_t aux = plan->out_rows * plan->out_ld * b.stride;
  const int64_t primal = (plan->plane_size[kPrimal] - (b.remake ? plan->remade_size : 0)) * b.stride;
  const int64_t delta = plan->plane_size[kDelta] * b.stride;
  T* kept_at = state(k) + plan->state_blocks + (chunk * cut.blocks + index) * (aux + primal + delta);
  T* transient = workers[worker].planes;
  b.planes[kPrimal] = (kept ? kept_at : transient) + aux;
  b.planes[kDelta] = b.planes[kPrimal] + primal;
  b.planes[kTangent] = kept ? transient : transient + aux + primal + delta;
  b.planes[kDeltaTangent] = b.planes[kTangent] + plan->plane_size[kTangent] * b.stride;
  return b;
}

template <class T>
LossBlock<T> Runner<T>::loss_of(const Phase& phase, const Block<T>& b, int64_t chunk, int64_t index, T scale) const {
  const int64_t start = chunk * chunk_samples(*phase.cut) + index * phase.cut->block_samples;
  const bool ids = phase.loss.kind == kCrossEntropy;
  const int64_t at = phase.set * phase.cut->samples + start;
  const char* y = static_cast<const char*>(phase.y);
  const int64_t stride = ids ? int64_t(sizeof(int64_t)) : plan->out_size * int64_t(sizeof(T));
  return {phase.loss,
          b.samples,
          plan->out_rows,
          plan->out_features,
          plan->out_ld,
          plane_of(b, plan->output, kPrimal),
          plane_of(b, plan->output, kDelta),
          aux_of(b),
          y ? y + at * stride : nullptr,
          phase.coef + start,
          scale};
}

// Planes of the nodes that depend on parameters only.
template <class T>
T* Runner<T>::fixed_plane(const Phase& phase, int64_t k, Plane plane) const {
  switch (plane) {
    case kPrimal:
      return phase.query ? fixed_query[0] : state(k) + plan->state_fixed;
    case kDelta:
      return phase.query ? fixed_query[1] : state(k) + plan->state_fixed + plan->fixed_size[kPrimal];
    case kTangent:
      return fixed_tangent[0];
    default:
      return fixed_tangent[1];
  }
}

// Nodes that depend on parameters only: once a pass, before the blocks (values, tangents) or after them (gradients).
template <class T>
void Runner<T>::fixed_nodes(const Phase& phase, int64_t k, Plane plane, const Sink<T>* sink, bool inner) {
  if (plan->fixed_size[kPrimal] == 0) return;
  Block<T> b = {};
  b.plan = plan, b.samples = 1, b.params = now, b.direction = along, b.tangent = !plan->first_order, b.workers = 1;
  for (int each = 0; each < kPlanes; ++each) b.fixed[each] = fixed_plane(phase, k, Plane(each));
  const bool backward = plane == kDelta || plane == kDeltaTangent;
  for (int64_t n = 0; n < plan->n_values; ++n) {
    const int32_t i = int32_t(backward ? plan->n_values - 1 - n : n);
    if (!plan->values[i].live || plan->values[i].batched) continue;
    if (plane == kPrimal)
      node_forward<T>(b, i);
    else if (plane == kTangent)
      node_tangent<T>(b, i);
    else
      node_backward<T>(b, i, plane, *sink, inner);
  }
}

template <class T>
void forward_block(const Block<T>& b) {
  for (int32_t i = 0; i < b.plan->n_values && !stops(b.watch); ++i)
    if (b.plan->values[i].live && b.plan->values[i].batched) node_forward<T>(b, i);
}

template <class T>
void tangent_block(const Block<T>& b) {
  for (int32_t i = 0; i < b.plan->n_values && !stops(b.watch); ++i)
    if (b.plan->values[i].live && b.plan->values[i].batched) node_tangent<T>(b, i);
}

template <class T>
void backward_block(const Block<T>& b, Plane plane, const Sink<T>& sink, bool inner) {
  for (int32_t i = int32_t(b.plan->n_values) - 1; i >= 0 && !stops(b.watch); --i)
    if (b.plan->values[i].live && b.plan->values[i].batched) node_backward<T>(b, i, plane, sink, inner);
}

// A chunk's buffer of gradients, of parameters (which not every block writes) and, in `plane`, of unbatched values.
template <class T>
T* Runner<T>::begin_chunk(const Cut& cut, int64_t chunk, Plane plane) {
  T* own = chunk_grads + chunk * plan->chunk_size;
  if (cut.chunks > 1) fill_zero<T>(own, plan->lambda_size);
  fill_zero<T>(own + plan->lambda_size + (plane == kDelta ? 0 : plan->fixed_size[kDelta]), plan->fixed_size[plane]);
  return own;
}

template <class T>
double Runner<T>::sum_losses(const Cut& cut) const {
  double loss = 0;
  for (int64_t c = 0; c < cut.chunks; ++c) loss += chunk_loss[c];
  return loss;
}

// dst[0..n) = init + the chunks' buffers, in their order.
template <class T>
void Runner<T>::sum_chunks(int64_t chunks, int64_t n, const T* init, T* dst) const {
  for (int64_t i = 0; i < n; i += Simd<T>::kLanes) {
    VecOf<T> sum = init ? load<T>(init + i) : VecOf<T>{};
    for (int64_t c = 0; c < chunks; ++c) sum += load<T>(chunk_grads + c * plan->chunk_size + i);
    store<T>(dst + i, sum);
  }
}

// After the chunks: what they send to unbatched values is summed and goes on to the parameters below them, to where
// aim(worker) points.
template <class T>
template <class Aim>
void Runner<T>::finish_chunks(const Phase& phase, int64_t k, Plane plane, const T* beta, bool inner, Aim aim) {
  const int64_t n = plan->fixed_size[plane], at = plan->lambda_size + (plane == kDelta ? 0 : plan->fixed_size[kDelta]);
  if (n == 0) return;
  T* sum = fixed_plane(phase, k, plane);
  fill_zero<T>(sum, n);
  for (int64_t c = 0; c < phase.cut->chunks; ++c)
    affine<T>(chunk_grads + c * plan->chunk_size + at, n, T(1), T(0), true, sum);
  aim(workers[0]);
  const Sink<T> sink = {workers[0].dst, workers[0].init, beta, true};
  fixed_nodes(phase, k, plane, &sink, inner);
}

template <class T>
void copy_elements(const T* src, int64_t n, T* dst) {
  __builtin_memcpy(dst, src, sizeof(T) * size_t(n));
}

// Forward, loss and gradient of the support set at theta_k. Where one rate serves each tensor and one block holds all
// samples, the products write theta_{k+1} = theta_k - alpha g themselves; else g goes to a buffer and take_step uses
// it.
template <class T>
void Runner<T>::inner_step(int64_t k, bool record) {
  const Phase phase = support(k);
  const Cut& cut = plan->support;
  point_to(k, false);
  fixed_nodes(phase, k, kPrimal, nullptr, true);
  const bool fused = plan->fused_update;
  T* grad = gradient(k);
  for (int64_t i = 0; i < plan->n_params; ++i) {
    const ParamPlan& p = plan->params[i];
    if (p.low && p.adapted) negative_rates[k * plan->n_params + i] = -rate(p, k)[0];
    if (p.stepped) negative_rate[i] = fused ? -rate(p, k)[0] : T(1);
  }
  const auto aim = [&](Worker<T>& w, T* base) {
    for (int64_t i = 0; i < plan->n_params; ++i) {
      const ParamPlan& p = plan->params[i];
      w.dst[i] = p.stepped ? (fused ? state(k) : base) + p.own : nullptr;
      w.init[i] = fused && p.stepped ? now[i].value : nullptr;
    }
  };
  each_chunk(cut, [&](int64_t chunk, int worker) {
    Worker<T>& w = workers[worker];
    T* own = begin_chunk(cut, chunk, kDelta);
    aim(w, cut.chunks == 1 ? grad : own);
    double loss = 0;
    for (int64_t index = 0; index < cut.blocks; ++index) {
      const Block<T> b = block(phase, chunk, index, worker, k, plan->keep_planes);
      forward_block(b);
      loss += loss_block<T>(loss_of(phase, b, chunk, index, T(1)));
      backward_block(b, kDelta, Sink<T>{w.dst, w.init, negative_rate, index == 0}, true);
    }
    chunk_loss[chunk] = loss;
  });
  if (plan->low_rank) factors[k] = {passes + k, kPrimal, kDelta, negative_rates + k * plan->n_params};
  if (record) losses[k] = T(sum_losses(cut));
  if (cut.chunks > 1) sum_chunks(cut.chunks, plan->own_size, nullptr, grad);
  finish_chunks(phase, k, kDelta, negative_rate, true, [&](Worker<T>& w) { aim(w, grad); });
}

// theta_{k+1} and its transposes.
template <class T>
void Runner<T>::take_step(int64_t k) {
  T* next = state(k);
  const T* grad = gradient(k);
  if (!plan->plain) rule_step(k);
  for (int64_t i = 0; i < plan->n_params; ++i) {
    const ParamPlan& p = plan->params[i];
    if (!p.stepped) continue;
    const T* alpha = rate(p, k);
    const bool elements = plan->lrs[p.lr].elements;
    if (!plan->plain) {
    } else if (!p.used) {
      copy_elements(now[i].value, p.size, next + p.own);
    } else if (!plan->fused_update) {
      for (int64_t e = 0; e < p.size; e += Simd<T>::kLanes) {
        const VecOf<T> a = elements ? load<T>(alpha + e) : splat<T>(alpha[0]);
        store<T>(next + p.own + e, multiply_add<T>(-a, load<T>(grad + p.own + e), load<T>(now[i].value + e)));
      }
    }
    if (p.size_t_) transpose_param<T>(p, next + p.own, next + plan->own_size + p.own_t);
  }
  if (segmented() && (k + 1) % plan->slots == 0) {
    T* mark = checkpoints + (k + 1) / plan->slots * set_size();
    const int64_t size = plan->own_size + plan->own_t_size;
    copy_elements(next, size, mark);
    copy_elements(next + plan->state_moments, plan->n_moments * plan->own_size, mark + size);
  }
}

template <class T>
void write_rows(const T* src, int64_t ld, int64_t rows, int64_t features, T* dst) {
  for (int64_t r = 0; r < rows; ++r) copy_elements(src + r * ld, features, dst + r * features);
}

// dz of the outputs: what the caller's own use of them sends back.
template <class T>
void add_rows(const T* src, int64_t rows, int64_t features, int64_t ld, bool add, T* dst) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t f = 0; f < ld; f += Simd<T>::kLanes) {
      const VecOf<T> g = f < features ? load_some<T>(src + r * features + f, features - f) : VecOf<T>{};
      T* to = dst + r * ld + f;
      store<T>(to, add ? load<T>(to) + g : g);
    }
}

// The query set at theta_k: its loss, the outputs at theta_K, and (differentiating) w_k grad L_q into lambda.
template <class T>
void Runner<T>::query_pass(int64_t k, bool add) {
  const Phase phase = query();
  const Cut& cut = plan->query;
  const bool shown = k == plan->steps || plan->query_steps, backward = differentiate();
  const T weight = step_weight(k), scale = weight * cotangent(k);
  const int64_t at_output = plan->query_steps ? k * call->tasks * cut.samples * plan->out_size : 0;
  const T* extra = shown && call->grad_output ? static_cast<const T*>(call->grad_output) + at_output : nullptr;
  point_to(k, true);
  fixed_nodes(phase, k, kPrimal, nullptr, false);
  const auto aim = [&](Worker<T>& w, T* base) {
    for (int64_t i = 0; i < plan->n_params; ++i) {
      w.dst[i] = gradient_of(base, i, k, true);
      w.init[i] = (add || plan->params[i].layout == kStepRows) && base == lambda ? w.dst[i] : nullptr;
    }
  };
  each_chunk(cut, [&](int64_t chunk, int worker) {
    Worker<T>& w = workers[worker];
    T* own = begin_chunk(cut, chunk, kDelta);
    aim(w, cut.chunks == 1 ? lambda : own);
    chunk_loss[chunk] = 0;
    for (int64_t index = 0; index < cut.blocks; ++index) {
      const Block<T> b = block(phase, chunk, index, worker, 0, false);
      const int64_t first = task * cut.samples + chunk * chunk_samples(cut) + index * cut.block_samples;
      const int64_t rows = b.samples * plan->out_rows;
      forward_block(b);
      LossBlock<T> loss = loss_of(phase, b, chunk, index, scale);
      if (shown && call->output)
        write_rows(loss.z, plan->out_ld, rows, plan->out_features,
                   static_cast<T*>(call->output) + at_output + first * plan->out_size);
      if (!backward) loss.dz = nullptr;
      if (phase.y) chunk_loss[chunk] += loss_block<T>(loss);
      if (backward && phase.y) collect_data_gradients(phase, loss, nullptr, scale, chunk, index);
      if (!backward) continue;
      if (extra)
        add_rows(extra + first * plan->out_size, rows, plan->out_features, plan->out_ld, phase.y != nullptr, loss.dz);
      else if (!phase.y)
        fill_zero<T>(loss.dz, rows * plan->out_ld);
      backward_block(b, kDelta, Sink<T>{w.dst, w.init, shared->ones, index == 0}, false);
      if (call->grad_query_x) collect_input_gradient(phase, b, chunk, index, kDelta, call->grad_query_x);
    }
  });
  if (phase.y) losses[plan->steps + (plan->query_steps ? k : 0)] += T(double(weight) * sum_losses(cut));
  if (!backward) return;
  if (phase.y) weight_gradients(phase);
  if (cut.chunks > 1) sum_chunks(cut.chunks, plan->lambda_size, add ? lambda : nullptr, lambda);
  finish_chunks(phase, k, kDelta, shared->ones, false, [&](Worker<T>& w) { aim(w, lambda); });
}

}  // namespace
}  // namespace mtmlk
