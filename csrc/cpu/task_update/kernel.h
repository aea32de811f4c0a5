// One step of an update rule for all tensors of all tasks; mtml/update.h has the mathematics of an element.
//
//   forward   (theta', s') = update(theta, s, c g)      c = min(1, m / (|g| + 1e-6)) over a task's tensors, 1 without it
//   backward  the cotangents of theta' and s' to those of theta, s, g, the rates and the rule's numbers
// Threads take tasks; what a task's sums are made of is fixed by its own sizes.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/update.h"
#include "simd/simd.h"
#include "simd/vmath.h"
#include "runtime/stops.h"
#include "runtime/crew.h"

namespace mtmlk {
namespace {

constexpr int64_t kSumPiece = 1024;  // elements whose terms are added up in T, the sums of these in double

template <class T>
const T* of_task(const void* const* list, int64_t i, int64_t task, int64_t step) {
  return list[i] ? static_cast<const T*>(list[i]) + task * step : nullptr;
}

template <class T>
T* of_task(void* const* list, int64_t i, int64_t task, int64_t step) {
  return list[i] ? static_cast<T*>(list[i]) + task * step : nullptr;
}

// One tensor of one task: what its elements are read from and written to.
template <class T>
struct TaskTensor {
  int64_t size;
  const T *theta, *g, *alpha, *s[kMaxMoments];
  bool elements;  // a rate for each, else one
  T *after, *s_after[kMaxMoments];
  const T *lambda, *mu[kMaxMoments];
  T *dtheta, *dg, *dalpha, *ds[kMaxMoments];
};

template <class T>
TaskTensor<T> task_tensor(const MtmlkTaskUpdate& c, int64_t i, int64_t task, bool backward) {
  const int64_t n = c.sizes[i], moments = update_moments(c.rule, c.flags);
  TaskTensor<T> t = {};
  t.size = n, t.theta = of_task<T>(c.params, i, task, n), t.g = of_task<T>(c.grads, i, task, n);
  t.elements = c.rate_elements[i] != 0;
  t.alpha = of_task<T>(c.rates, i, c.rate_tasks[i] ? task : 0, t.elements ? n : 1);
  for (int64_t m = 0; m < moments; ++m) t.s[m] = c.moments ? of_task<T>(c.moments, m * c.n + i, task, n) : nullptr;
  if (!backward) {
    t.after = of_task<T>(c.params_after, i, task, n);
    for (int64_t m = 0; m < moments; ++m) t.s_after[m] = of_task<T>(c.moments_after, m * c.n + i, task, n);
    return t;
  }
  t.lambda = of_task<T>(c.cot_params, i, task, n), t.dtheta = of_task<T>(c.d_params, i, task, n);
  t.dg = of_task<T>(c.d_grads, i, task, n), t.dalpha = of_task<T>(c.d_rates, i, task, t.elements ? n : 1);
  for (int64_t m = 0; m < moments; ++m) {
    t.mu[m] = of_task<T>(c.cot_moments, m * c.n + i, task, n);
    t.ds[m] = of_task<T>(c.d_moments, m * c.n + i, task, n);
  }
  return t;
}

template <class T>
MTMLK_INLINE VecOf<T> load_given(const T* p, int64_t at, int64_t n) {
  return p ? load_some<T>(p + at, n - at) : VecOf<T>{};
}

// term(element) over all elements of a task's gradient: in T over pieces, in double over these.
template <class T, class Term>
double task_sum(const MtmlkTaskUpdate& c, int64_t task, bool backward, Term term) {
  double total = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    const TaskTensor<T> t = task_tensor<T>(c, i, task, backward);
    for (int64_t piece = 0; piece < t.size; piece += kSumPiece) {
      const int64_t end = t.size - piece < kSumPiece ? t.size : piece + kSumPiece;
      VecOf<T> sum = {};
      for (int64_t e = piece; e < end; e += Simd<T>::kLanes) sum += term(t, e);
      total += double(sum_lanes<T>(sum));
    }
  }
  return total;
}

template <class T>
double squares_of(const MtmlkTaskUpdate& c, int64_t task, bool backward) {
  return task_sum<T>(c, task, backward, [](const TaskTensor<T>& t, int64_t e) {
    const VecOf<T> g = load_given<T>(t.g, e, t.size);
    return g * g;
  });
}

template <class T>
void update_task(const MtmlkTaskUpdate& c, const UpdateStep<T>& u, int64_t task) {
  const bool clipped = u.has(kUpdateClipped);
  const T scale = clipped ? T(clip_factor(squares_of<T>(c, task, false), c.hyper[kHyperClip])) : T(1);
  const int moments = update_moments(c.rule, c.flags);
  for (int64_t i = 0; i < c.n; ++i) {
    const TaskTensor<T> t = task_tensor<T>(c, i, task, false);
    for (int64_t e = 0; e < t.size; e += Simd<T>::kLanes) {
      VecOf<T> s[kMaxMoments] = {};
      for (int m = 0; m < moments; ++m) s[m] = load_given<T>(t.s[m], e, t.size);
      const VecOf<T> alpha = t.elements ? load_given<T>(t.alpha, e, t.size) : splat<T>(t.alpha[0]);
      const VecOf<T> g = scale * load_given<T>(t.g, e, t.size), theta = load_given<T>(t.theta, e, t.size);
      const VecOf<T> after = update_forward<VectorMath<T>>(u, alpha, theta, g, s).theta;
      store_some<T>(t.after + e, after, t.size - e);
      for (int m = 0; m < moments; ++m) store_some<T>(t.s_after[m] + e, s[m], t.size - e);
    }
  }
}

template <class T>
void task_update_forward(const MtmlkTaskUpdate& c, const Crew& crew) {
  const UpdateStep<T> u = update_at<T>(c.rule, c.flags, c.hyper, c.step);
  share(crew, c.tasks, [&](int64_t task, int) { update_task<T>(c, u, task); });
}

// The way back from one tensor; hyper [kHyperCount] and the sum of a rate's terms are added to.
template <class T>
void adjoint_tensor(const TaskTensor<T>& t, const UpdateStep<T>& u, int moments, T scale, double* hyper,
                    double* of_rate) {
  for (int64_t piece = 0; piece < t.size; piece += kSumPiece) {
    const int64_t end = t.size - piece < kSumPiece ? t.size : piece + kSumPiece;
    VecOf<T> own[kHyperCount] = {}, rate = {};
    for (int64_t e = piece; e < end; e += Simd<T>::kLanes) {
      VecOf<T> s[kMaxMoments] = {}, mu[kMaxMoments] = {};
      for (int m = 0; m < moments; ++m) s[m] = load_given<T>(t.s[m], e, t.size);
      for (int m = 0; m < moments; ++m) mu[m] = load_given<T>(t.mu[m], e, t.size);
      const VecOf<T> alpha = t.elements ? load_given<T>(t.alpha, e, t.size) : splat<T>(t.alpha[0]);
      const VecOf<T> g = scale * load_given<T>(t.g, e, t.size);
      const UpdateAdjoint<VectorMath<T>> back = update_adjoint<VectorMath<T>>(
          u, alpha, load_given<T>(t.theta, e, t.size), g, s, load_given<T>(t.lambda, e, t.size), mu, own);
      store_some<T>(t.dtheta + e, back.theta, t.size - e);
      store_some<T>(t.dg + e, scale * back.g, t.size - e);
      for (int m = 0; m < moments && t.ds[m]; ++m) store_some<T>(t.ds[m] + e, mu[m], t.size - e);
      if (t.elements) store_some<T>(t.dalpha + e, back.alpha, t.size - e);
      rate += keep_lanes<T>(back.alpha, t.size - e);
    }
    *of_rate += double(sum_lanes<T>(rate));
    for (int h = 0; h < kHyperCount; ++h) hyper[h] += double(sum_lanes<T>(own[h]));
  }
}

// The gradients are those of c g by now, times c: what c itself depends on is added.
template <class T>
void unclip_task(const MtmlkTaskUpdate& c, int64_t task, double squares, T scale, double* hyper) {
  const double scaled = task_sum<T>(c, task, true, [](const TaskTensor<T>& t, int64_t e) {
    return load_given<T>(t.g, e, t.size) * load_given<T>(t.dg, e, t.size);
  });
  const ClipAdjoint back = clip_adjoint(squares, scaled / double(scale), c.hyper[kHyperClip]);
  hyper[kHyperClip] += back.of_bound;
  const T along = T(back.along_g);
  for (int64_t i = 0; i < c.n; ++i) {
    const TaskTensor<T> t = task_tensor<T>(c, i, task, true);
    for (int64_t e = 0; e < t.size; e += Simd<T>::kLanes) {
      const VecOf<T> whole = load_given<T>(t.dg, e, t.size) + along * load_given<T>(t.g, e, t.size);
      store_some<T>(t.dg + e, whole, t.size - e);
    }
  }
}

template <class T>
void adjoint_task(const MtmlkTaskUpdate& c, const UpdateStep<T>& u, int64_t task) {
  const bool clipped = u.has(kUpdateClipped);
  const double squares = clipped ? squares_of<T>(c, task, true) : 0;
  const T scale = clipped ? T(clip_factor(squares, c.hyper[kHyperClip])) : T(1);
  double hyper[kHyperCount] = {};
  for (int64_t i = 0; i < c.n; ++i) {
    const TaskTensor<T> t = task_tensor<T>(c, i, task, true);
    double of_rate = 0;
    adjoint_tensor<T>(t, u, update_moments(c.rule, c.flags), scale, hyper, &of_rate);
    if (!t.elements && t.dalpha) t.dalpha[0] = T(of_rate);
  }
  if (clipped && scale != T(1)) unclip_task<T>(c, task, squares, scale, hyper);
  for (int h = 0; h < kHyperCount; ++h) c.d_hyper[task * kHyperCount + h] = hyper[h];
}

template <class T>
void task_update_backward(const MtmlkTaskUpdate& c, const Crew& crew) {
  const UpdateStep<T> u = update_at<T>(c.rule, c.flags, c.hyper, c.step);
  share(crew, c.tasks, [&](int64_t task, int) { adjoint_task<T>(c, u, task); });
}

}  // namespace
}  // namespace mtmlk
