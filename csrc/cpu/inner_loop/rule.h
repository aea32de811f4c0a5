// Update rules in the engine: a step of all tensors, and its way back; mtml/update.h has the mathematics of an element.
//
//   (theta, s)_{k+1} = update(theta_k, s_k, c_k g_k)          c_k: by which clipping scales, 1 without it
//   V                = cotangent of g_k, for lambda_k += H_k V in the tangent pass
//   c = min(1, m / (n + 1e-6)), n = |g|, where below 1:       V = c h - m / (n (n + 1e-6)^2) <h, g> g      h: of c g

#pragma once

#include <stdint.h>

#include "mtml/update.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "simd/vmath.h"
#include "inner_loop/plan/plan.h"
#include "layers/elementwise.h"
#include "layers/params.h"
#include "inner_loop/runner.h"

namespace mtmlk {
namespace {

template <class T>
T* Runner<T>::gradient(int64_t k) const {
  const bool kept = (plan->needs & MTMLK_NEED_LR) || (plan->needs && !plan->plain);
  return kept ? state(k) + plan->state_grad : chunk_grads;
}

template <class T>
const T* Runner<T>::moments_before(int64_t k) const {
  if (k == 0) return moments[0];
  if (segmented() && k % plan->slots == 0) return theta(k) + plan->own_size + plan->own_t_size;
  return state(k - 1) + plan->state_moments;
}

template <class T>
UpdateStep<T> Runner<T>::rule_at(int64_t k) const {
  return update_at<T>(plan->rule, plan->rule_flags, call->hyper, plan->taken + k);
}

// The task's own parameters at the start, and their transposes.
template <class T>
void Runner<T>::load_start() {
  for (int64_t i = 0; start && i < plan->n_params; ++i) {
    const ParamPlan& p = plan->params[i];
    if (!p.starts) continue;
    pack_param<T>(p, static_cast<const T*>(call->params[i]) + task * p.rows * p.cols, start + p.own);
    if (p.size_t_) transpose_param<T>(p, start + p.own, start + plan->own_size + p.own_t);
  }
}

template <class T>
void Runner<T>::load_moments() {
  if (plan->n_moments == 0) return;
  fill_zero<T>(moments[0], plan->n_moments * plan->own_size);
  int64_t nth = 0;
  for (int64_t m = 0; call->moments && m < plan->n_moments; ++m)
    for (int64_t i = 0; i < plan->n_params; ++i) {
      const ParamPlan& p = plan->params[i];
      if (!p.adapted) continue;
      const T* given = static_cast<const T*>(call->moments[nth++]);
      pack_param<T>(p, given + task * p.rows * p.cols, moments[0] + m * plan->own_size + p.own);
    }
}

// Of the gradient over all adapted tensors; an unused one's is zero.
template <class T>
T Runner<T>::clip_scale(int64_t k) const {
  double squares = 0;
  for (int64_t i = 0; i < plan->n_params; ++i) {
    const ParamPlan& p = plan->params[i];
    if (!p.stepped || !p.used) continue;
    const T* g = gradient(k) + p.own;
    VecOf<T> sum = {};
    for (int64_t e = 0; e < p.size; e += Simd<T>::kLanes) sum += load<T>(g + e) * load<T>(g + e);
    squares += double(sum_lanes<T>(sum));
  }
  return T(clip_factor(squares, call->hyper[kHyperClip]));
}

// theta_{k+1} and the moments after step k.
template <class T>
void Runner<T>::rule_step(int64_t k) {
  using M = VectorMath<T>;
  const UpdateStep<T> u = rule_at(k);
  if (clip) clip[k] = clip_scale(k);
  const T scale = clip ? clip[k] : T(1);
  const T *grad = gradient(k), *before = moments_before(k);
  T *next = state(k), *after = next + plan->state_moments;
  for (int64_t i = 0; i < plan->n_params; ++i) {
    const ParamPlan& p = plan->params[i];
    if (!p.stepped) continue;
    const T* alpha = rate(p, k);
    const bool elements = plan->lrs[p.lr].elements;
    for (int64_t e = 0; e < p.size; e += Simd<T>::kLanes) {
      const int64_t at = p.own + e;
      VecOf<T> s[kMaxMoments] = {};
      for (int64_t m = 0; m < plan->n_moments; ++m) s[m] = load<T>(before + m * plan->own_size + at);
      const VecOf<T> a = elements ? load<T>(alpha + e) : splat<T>(alpha[0]);
      const VecOf<T> g = p.used ? scale * load<T>(grad + at) : VecOf<T>{};
      store<T>(next + at, update_forward<M>(u, a, load<T>(now[i].value + e), g, s).theta);
      for (int64_t m = 0; m < plan->n_moments; ++m) store<T>(after + m * plan->own_size + at, s[m]);
    }
  }
}

// Those of the moments after the last step, as the caller gives them.
template <class T>
void Runner<T>::start_cotangents() {
  if (plan->n_moments == 0) return;
  fill_zero<T>(moments[1], plan->n_moments * plan->own_size);
  int64_t nth = 0;
  for (int64_t m = 0; call->grad_moments && m < plan->n_moments; ++m)
    for (int64_t i = 0; i < plan->n_params; ++i) {
      const ParamPlan& p = plan->params[i];
      if (!p.adapted) continue;
      const T* given = static_cast<const T*>(call->grad_moments[nth++]);
      if (given) pack_param<T>(p, given + task * p.rows * p.cols, moments[1] + m * plan->own_size + p.own);
    }
}

// lambda_{k+1} and the moments' cotangents to those before step k but for H_k V; V; the gradients of rates and numbers.
template <class T>
void Runner<T>::rule_adjoint(int64_t k) {
  using M = VectorMath<T>;
  const UpdateStep<T> u = rule_at(k);
  const T scale = clip ? clip[k] : T(1);
  const T *grad = gradient(k), *before = moments_before(k);
  double hyper[kHyperCount] = {};
  point_to(k, false);
  for (int64_t i = 0; i < plan->n_params; ++i) {
    const ParamPlan& p = plan->params[i];
    if (!p.stepped) continue;
    const T* alpha = rate(p, k);
    const LrPlan& lr = plan->lrs[p.lr];
    T* to_rate = plan->needs & MTMLK_NEED_LR ? lambda + lr.carry + (lr.steps == 1 ? 0 : k * lr.size) : nullptr;
    VecOf<T> own[kHyperCount] = {}, of_rate = {};
    for (int64_t e = 0; e < p.size; e += Simd<T>::kLanes) {
      const int64_t at = p.own + e;
      VecOf<T> s[kMaxMoments] = {}, mu[kMaxMoments] = {};
      for (int64_t m = 0; m < plan->n_moments; ++m) {
        s[m] = load<T>(before + m * plan->own_size + at);
        mu[m] = load<T>(moments[1] + m * plan->own_size + at);
      }
      const VecOf<T> a = lr.elements ? load<T>(alpha + e) : splat<T>(alpha[0]);
      const VecOf<T> g = p.used ? scale * load<T>(grad + at) : VecOf<T>{};
      const UpdateAdjoint<M> back =
          update_adjoint<M>(u, a, load<T>(now[i].value + e), g, s, load<T>(lambda + p.full + e), mu, own);
      store<T>(lambda + p.full + e, back.theta);
      store<T>(direction + at, p.used ? back.g : VecOf<T>{});
      for (int64_t m = 0; m < plan->n_moments; ++m) store<T>(moments[1] + m * plan->own_size + at, mu[m]);
      if (to_rate && lr.elements) store<T>(to_rate + e, load<T>(to_rate + e) + back.alpha);
      of_rate += back.alpha;
    }
    if (to_rate && !lr.elements) to_rate[0] += sum_lanes<T>(of_rate);
    for (int h = 0; h < kHyperCount; ++h) hyper[h] += double(sum_lanes<T>(own[h]));
  }
  if (clip && scale != T(1)) unclip(k, hyper);
  for (int h = 0; h < kHyperCount && (plan->needs & MTMLK_NEED_HYPER); ++h) lambda[plan->hyper_at + h] += T(hyper[h]);
  for (int64_t i = 0; i < plan->n_params; ++i) {
    const ParamPlan& p = plan->params[i];
    if (!p.stepped) continue;
    T *v = direction + p.own, *transposed = direction + plan->own_size + p.own_t;
    if (p.size_t_) transpose_param<T>(p, v, transposed);
    along[i] = {v, transposed};
  }
}

// V from the cotangent of the clipped gradient, where it was clipped.
template <class T>
void Runner<T>::unclip(int64_t k, double* hyper) {
  const T* grad = gradient(k);
  double inner = 0, squares = 0;
  const auto each = [&](auto body) {
    for (int64_t i = 0; i < plan->n_params; ++i) {
      const ParamPlan& p = plan->params[i];
      for (int64_t e = 0; p.stepped && p.used && e < p.size; e += Simd<T>::kLanes) body(p.own + e);
    }
  };
  each([&](int64_t at) {
    const VecOf<T> g = load<T>(grad + at);
    inner += double(sum_lanes<T>(load<T>(direction + at) * g));
    squares += double(sum_lanes<T>(g * g));
  });
  const ClipAdjoint back = clip_adjoint(squares, inner, call->hyper[kHyperClip]);
  hyper[kHyperClip] += back.of_bound;
  const T along_g = T(back.along_g);
  each([&](int64_t at) { store<T>(direction + at, clip[k] * load<T>(direction + at) + along_g * load<T>(grad + at)); });
}

template <class T>
void Runner<T>::write_moments() const {
  if (!call->moments_after || plan->n_moments == 0) return;
  const T* last = moments_before(plan->steps);
  int64_t nth = 0;
  for (int64_t m = 0; m < plan->n_moments; ++m)
    for (int64_t i = 0; i < plan->n_params; ++i) {
      const ParamPlan& p = plan->params[i];
      if (!p.adapted) continue;
      T* dst = static_cast<T*>(call->moments_after[nth++]) + task * p.rows * p.cols;
      unpack_param<T>(p, last + m * plan->own_size + p.own, dst);
    }
}

}  // namespace
}  // namespace mtmlk
