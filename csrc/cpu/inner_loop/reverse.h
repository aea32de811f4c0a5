// The way back through the inner steps.
#pragma once

#include <stdint.h>

#include "simd/layout.h"
#include "simd/simd.h"
#include "inner_loop/plan/plan.h"
#include "layers/elementwise.h"
#include "layers/params.h"
#include "inner_loop/data_gradients.h"
#include "inner_loop/factors.h"
#include "inner_loop/loss.h"
#include "inner_loop/passes.h"
#include "inner_loop/runner.h"

namespace mtmlk {
namespace {

// The factors of lambda_{k+1}, which those of V are but for the rates.
template <class T>
void Runner<T>::point_along(int64_t k) {
  if (!plan->low_rank) return;
  low.n_along = 0;
  Factor<T>* lambdas = factors + plan->steps;
  each_factor<T>(*plan, *call, passes, k + 1, negative_rates + k * plan->n_params,
                 [&](const Factor<T>& f) { lambdas[low.n_along++] = f; });
}

// V = -alpha_k lambda_{k+1} on the adapted parameters, and its transposes.
template <class T>
void Runner<T>::make_direction(int64_t k) {
  for (int64_t i = 0; i < plan->n_params; ++i) {
    const ParamPlan& p = plan->params[i];
    if (!p.stepped) continue;
    const T* alpha = rate(p, k);
    const bool elements = plan->lrs[p.lr].elements;
    T* v = direction + p.own;
    for (int64_t e = 0; e < p.size; e += Simd<T>::kLanes) {
      const VecOf<T> a = elements ? load<T>(alpha + e) : splat<T>(alpha[0]);
      store<T>(v + e, -a * load<T>(lambda + p.full + e));
    }
    T* transposed = direction + plan->own_size + p.own_t;
    if (p.size_t_) transpose_param<T>(p, v, transposed);
    along[i] = {v, transposed};
  }
}

// dalpha_k -= g_k lambda_{k+1}, summed over what shares one rate.
template <class T>
void Runner<T>::rate_gradients(int64_t k) {
  const T* grad = state(k) + plan->state_grad;
  for (int64_t i = 0; i < plan->n_params; ++i) {
    const ParamPlan& p = plan->params[i];
    if (!p.adapted || !p.used) continue;
    const LrPlan& lr = plan->lrs[p.lr];
    T* out = lambda + lr.carry + (lr.steps == 1 ? 0 : k * lr.size);
    if (p.low) {
      out[0] -= T(low_rank_inner<T>({passes + k, kPrimal, kDelta, nullptr}, low, plan->values[p.layer], p.cols));
      continue;
    }
    const T *g = grad + p.own, *l = lambda + p.full;
    double total = 0;
    for (int64_t e = 0; e < p.size; e += Simd<T>::kLanes) {
      const VecOf<T> product = load<T>(g + e) * load<T>(l + e);
      if (lr.elements)
        store<T>(out + e, load<T>(out + e) - product);
      else
        total += double(sum_lanes<T>(product));
    }
    if (!lr.elements) out[0] -= T(total);
  }
}

template <class T>
void Runner<T>::add_external(int64_t k) {
  if (!call->grad_adapted || (plan->keep == 1 && k < plan->steps)) return;
  int64_t which = 0;
  for (int64_t i = 0; i < plan->n_params; ++i) {
    const ParamPlan& p = plan->params[i];
    if (!p.adapted) continue;
    const T* g = static_cast<const T*>(call->grad_adapted[which++]);
    if (!g) continue;
    const int64_t row = plan->keep == 2 ? k * call->tasks + task : task;
    T* packed = direction + p.own;  // V is made anew afterwards
    pack_param<T>(p, g + row * p.rows * p.cols, packed);
    affine<T>(packed, p.size, T(1), T(0), true, lambda + p.full);
  }
}

// lambda += H_k V + seed g_k, and the same for the support inputs.
template <class T>
void Runner<T>::tangent_pass(int64_t k, T seed) {
  const bool second = !plan->first_order;
  if (!second && seed == 0 && !(plan->low_rank && call->grad_support_losses)) return;
  const Phase phase = support(k);
  const Cut& cut = plan->support;
  point_to(k, false);
  if (second) fixed_nodes(phase, k, kTangent, nullptr, false);
  const auto aim = [&](Worker<T>& w, T* base) {
    for (int64_t i = 0; i < plan->n_params; ++i) {
      w.dst[i] = gradient_of(base, i, k, false);
      w.init[i] = base == lambda ? w.dst[i] : nullptr;
    }
  };
  each_chunk(cut, [&](int64_t chunk, int worker) {
    Worker<T>& w = workers[worker];
    T* own = begin_chunk(cut, chunk, kDeltaTangent);
    for (int64_t index = 0; index < cut.blocks; ++index) {
      Block<T> b = block(phase, chunk, index, worker, k, plan->keep_planes);
      const LossBlock<T> loss = loss_of(phase, b, chunk, index, T(1));
      if (!plan->keep_planes) {
        forward_block(b);
        loss_block<T>(loss);
        for (int64_t i = 0; i < plan->n_params; ++i) w.dst[i] = nullptr;
        if (second) backward_block(b, kDelta, Sink<T>{w.dst, w.init, shared->ones, false}, true);
      }
      b.tangent = second;
      tangent_block(b);
      const T* zt = has_tangent(b, plan->output) ? plane_of(b, plan->output, kTangent) : nullptr;
      loss_tangent<T>(loss, zt, seed, plane_of(b, plan->output, kDeltaTangent));
      collect_data_gradients(phase, loss, zt, seed, chunk, index);
      aim(w, cut.chunks == 1 ? lambda : own);
      backward_block(b, kDeltaTangent, Sink<T>{w.dst, w.init, shared->ones, index == 0}, false);
      if (call->grad_support_x) collect_input_gradient(phase, b, chunk, index, kDeltaTangent, call->grad_support_x);
    }
  });
  weight_gradients(phase);
  if (cut.chunks > 1) sum_chunks(cut.chunks, plan->lambda_size, lambda, lambda);
  finish_chunks(phase, k, kDeltaTangent, shared->ones, false, [&](Worker<T>& w) { aim(w, lambda); });
}

template <class T>
void Runner<T>::collect_input_gradient(const Phase& phase, const Block<T>& b, int64_t chunk, int64_t index, Plane plane,
                                       void* out) {
  const Cut& cut = *phase.cut;
  const int64_t first = phase.set * cut.samples + chunk * chunk_samples(cut) + index * cut.block_samples;
  const int64_t sets = call->tasks * (phase.query ? 1 : plan->support_sets);
  for (int32_t i = 0; i < plan->n_values; ++i) {
    const ValuePlan& v = plan->values[i];
    if (v.op != kInput || !v.live) continue;
    const InputPlan& input = plan->inputs[v.kind];
    T* dst = static_cast<T*>(out) + sets * cut.samples * input.offset + first * input.size;
    const T* src = plane_of(b, i, plane);
    for (int64_t r = 0; r < v.rows * b.samples; ++r)
      for (int64_t f = 0; f < v.features; ++f) dst[r * v.features + f] += src[r * v.ld + f];
  }
}

// Those that are added to, of the task's part of the data.
template <class T>
void Runner<T>::clear_gradients() const {
  const auto clear = [&](void* out, int64_t before, int64_t size) {
    if (out) __builtin_memset(static_cast<T*>(out) + before + task * size, 0, sizeof(T) * size_t(size));
  };
  const auto clear_set = [&](int64_t samples, void* x, void* y, void* mask) {
    for (int64_t i = 0; i < plan->n_inputs; ++i) {
      const InputPlan& input = plan->inputs[i];
      if (!input.ids) clear(x, call->tasks * samples * input.offset, samples * input.size);
    }
    clear(y, 0, samples * plan->out_size);
    clear(mask, 0, samples);
  };
  clear_set(plan->support_sets * plan->support.samples, call->grad_support_x, call->grad_support_y,
            call->grad_support_mask);
  clear_set(plan->query.samples, call->grad_query_x, call->grad_query_y, call->grad_query_mask);
}

template <class T>
void Runner<T>::collect_data_gradients(const Phase& phase, const LossBlock<T>& loss, const T* tangent, T seed,
                                       int64_t chunk, int64_t index) {
  if (!phase.to_y && !phase.to_mask) return;
  const Cut& cut = *phase.cut;
  const int64_t start = chunk * chunk_samples(cut) + index * cut.block_samples;
  T* to_y = static_cast<T*>(phase.to_y);
  if (to_y) to_y += (phase.set * cut.samples + start) * plan->out_size;
  data_gradients<T>(loss, tangent, seed, {to_y, phase.to_mask ? each_sample + start : nullptr});
}

// After the blocks of a pass: with L = sum w l / W the gradient of w_n is (l_n - L) / W, and likewise of their tangents.
template <class T>
void Runner<T>::weight_gradients(const Phase& phase) {
  if (!phase.to_mask) return;
  const int64_t n = phase.cut->samples;
  T* to = static_cast<T*>(phase.to_mask) + phase.set * n;
  double total, mean = 0;
  const T unit = T(unit_weight(phase, &total));
  if (unit == 0) return;
  for (int64_t i = 0; phase.loss.reduction == 0 && i < n; ++i) mean += double(phase.coef[i]) * double(each_sample[i]);
  const T shared = phase.loss.reduction == 0 ? T(mean / total) : T(0);
  for (int64_t i = 0; i < n; ++i) {
    const bool ignored =
        phase.loss.kind == kCrossEntropy && static_cast<const int64_t*>(phase.y)[phase.set * n + i] < 0;
    if (!ignored) to[i] += unit * each_sample[i] - shared;
  }
}

template <class T>
void Runner<T>::write_adapted(int64_t k) const {
  if (!call->adapted || (plan->keep == 1 && k < plan->steps)) return;
  const T* own = theta(k);
  int64_t which = 0;
  for (int64_t i = 0; i < plan->n_params; ++i) {
    const ParamPlan& p = plan->params[i];
    if (!p.adapted) continue;
    const int64_t row = plan->keep == 2 ? k * call->tasks + task : task;
    T* dst = static_cast<T*>(call->adapted[which++]) + row * p.rows * p.cols;
    if (own)
      unpack_param<T>(p, own + p.own, dst);
    else
      copy_elements(static_cast<const T*>(call->params[i]) + (p.starts ? task : 0) * p.rows * p.cols, p.rows * p.cols,
                    dst);
  }
}

// Recomputes the steps between two checkpoints.
template <class T>
void Runner<T>::replay(int64_t start, int64_t end) {
  for (int64_t k = start; k < end && !stops_at(k); ++k) {
    inner_step(k, false);
    take_step(k);
  }
}

}  // namespace
}  // namespace mtmlk
