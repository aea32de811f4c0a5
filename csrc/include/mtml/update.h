// Update rules: one inner step of one element, and its adjoint. Templates over a vector type, shared by every device.
//
//   sgd      b' = momentum b + (1 - dampening) g  (first step: b' = g)      d = b', nesterov: g + momentum b'
//   adam     m' = beta1 m + (1 - beta1) g     v' = beta2 v + (1 - beta2) g^2    d = B1 m' / (sqrt(B2 v' + root) + eps)
//   rmsprop  v' = beta2 v + (1 - beta2) g^2   a' = beta2 a + (1 - beta2) g (centered)
//            q  = g / (sqrt(v' - a'^2 + root) + eps)                        d = q, momentum: b' = momentum b + q
//   theta' = theta - alpha d,     Bi = 1 / (1 - betai^t)
// Weight decay joins g (g + decay theta) or, decoupled, shrinks theta (1 - alpha decay). The derivative of the square
// root is 0 at 0. The adjoint takes the cotangents of theta' and of the moments after the step to those before it.
#pragma once

#include <stdint.h>

#include "mtml/arithmetic.h"

namespace mtmlk {

enum UpdateRule : int32_t {
  kSgd = 0,
  kAdam = 1,
  kRmsprop = 2,
};

enum UpdateFlag : int32_t {
  kUpdateMomentum = 1,
  kUpdateNesterov = 2,
  kUpdateDecoupled = 4,
  kUpdateCentered = 8,
  kUpdateClipped = 16,
  kUpdateDecayed = 32,
};

// The numbers of a rule, in the order in which they travel and their gradients return.
enum UpdateHyper : int32_t {
  kHyperClip = 0,
  kHyperDecay = 1,
  kHyperMomentum = 2,
  kHyperDampening = 3,
  kHyperBeta1 = 4,
  kHyperBeta2 = 5,
  kHyperEps = 6,
  kHyperRoot = 7,
  kHyperCount = 8,
};

constexpr int kMaxMoments = 3;

// How many planes of moments a rule keeps.
inline int update_moments(int32_t rule, int32_t flags) {
  if (rule == kAdam) return 2;
  const int momentum = flags & kUpdateMomentum ? 1 : 0;
  return rule == kRmsprop ? 1 + (flags & kUpdateCentered ? 1 : 0) + momentum : momentum;
}

// A rule at one step: what does not depend on the element.
template <class T>
struct UpdateStep {
  int32_t rule, flags;
  bool first;  // no step has been taken
  T decay, momentum, beta1, beta2, eps, root;
  T fresh, rest1, rest2;  // 1 - dampening, 1 - beta1, 1 - beta2
  T bias1, bias2;         // B1, B2
  double slope1, slope2;  // dB1 / dbeta1, dB2 / dbeta2

  MTMLK_ANYWHERE bool has(int32_t flag) const { return (flags & flag) != 0; }
};

// x^n by squaring.
MTMLK_ANYWHERE double power(double x, int64_t n) {
  double result = 1;
  for (; n > 0; n /= 2, x *= x)
    if (n % 2) result *= x;
  return result;
}

// `step` counts from 0, steps of an earlier loop included. Powers and differences are taken in double, as torch.optim
// does: in float32 1 - 0.999 is wrong in its sixth digit.
template <class T>
MTMLK_ANYWHERE UpdateStep<T> update_at(int32_t rule, int32_t flags, const double* hyper, int64_t step) {
  UpdateStep<T> u = {};
  u.rule = rule, u.flags = flags, u.first = step == 0;
  u.decay = flags & kUpdateDecayed ? T(hyper[kHyperDecay]) : T(0), u.momentum = T(hyper[kHyperMomentum]);
  u.beta1 = T(hyper[kHyperBeta1]), u.beta2 = T(hyper[kHyperBeta2]);
  u.eps = T(hyper[kHyperEps]), u.root = T(hyper[kHyperRoot]);
  u.fresh = T(1 - hyper[kHyperDampening]), u.rest1 = T(1 - hyper[kHyperBeta1]), u.rest2 = T(1 - hyper[kHyperBeta2]);
  if (rule != kAdam) return u;
  const double before1 = power(hyper[kHyperBeta1], step), before2 = power(hyper[kHyperBeta2], step);  // beta^(t - 1)
  const double b1 = 1 / (1 - before1 * hyper[kHyperBeta1]), b2 = 1 / (1 - before2 * hyper[kHyperBeta2]);
  u.bias1 = T(b1), u.bias2 = T(b2);
  u.slope1 = double(step + 1) * before1 * b1 * b1, u.slope2 = double(step + 1) * before2 * b2 * b2;
  return u;
}

constexpr double kClipEps = 1e-6;  // torch.nn.utils.clip_grad_norm_'s

// By what a gradient is scaled whose elements' squares add up to `squares`; NaN stays.
MTMLK_ANYWHERE double clip_factor(double squares, double most) {
  const double scale = most / (__builtin_sqrt(squares) + kClipEps);
  return scale < 1 || scale != scale ? scale : 1;
}

// Of c g, c below 1, with the cotangent h: that of g is c h + along_g g, that of the bound `of_bound`; inner = <h, g>.
struct ClipAdjoint {
  double along_g, of_bound;
};

MTMLK_ANYWHERE ClipAdjoint clip_adjoint(double squares, double inner, double most) {
  const double norm = __builtin_sqrt(squares), divisor = norm + kClipEps;
  return {norm == 0 ? 0 : -most / (norm * divisor * divisor) * inner, inner / divisor};
}

// Where rmsprop has its momentum.
template <class T, class V>
MTMLK_ANYWHERE V& buffer_of(const UpdateStep<T>& u, V* s) {
  return u.has(kUpdateCentered) ? s[2] : s[1];
}

template <class M>
struct Updated {
  typename M::Value theta, d;
  // between the moments and d
  typename M::Value g, m, v, spread, divisor, scaled;
};

// x / y, and 0 where y is: without an eps, what has never had a gradient stays where it is.
template <class M>
MTMLK_ANYWHERE typename M::Value quotient(typename M::Value x, typename M::Value y) {
  using T = typename M::Scalar;
  const typename M::Value zero = y * T(0);
  return y == T(0) ? zero : x / (y == T(0) ? zero + T(1) : y);
}

// theta' and, in place, the moments. g is clipped already.
template <class M>
MTMLK_ANYWHERE Updated<M> update_forward(const UpdateStep<typename M::Scalar>& u, typename M::Value alpha,
                                         typename M::Value theta, typename M::Value g, typename M::Value* s) {
  using T = typename M::Scalar;
  using V = typename M::Value;
  Updated<M> r = {};
  r.g = u.has(kUpdateDecoupled) ? g : g + u.decay * theta;
  if (u.rule == kAdam) {
    r.m = s[0] = u.beta1 * s[0] + u.rest1 * r.g;
    r.v = s[1] = u.beta2 * s[1] + u.rest2 * r.g * r.g;
    const V x = r.v * u.bias2 + u.root;
    r.spread = M::sqrt(x > T(0) ? x : x * T(0));
    r.divisor = r.spread + u.eps;
    r.d = quotient<M>(r.m * u.bias1, r.divisor);
  } else if (u.rule == kRmsprop) {
    r.v = s[0] = u.beta2 * s[0] + u.rest2 * r.g * r.g;
    V x = r.v;
    if (u.has(kUpdateCentered)) {
      r.m = s[1] = u.beta2 * s[1] + u.rest2 * r.g;
      x = x - r.m * r.m;
    }
    x = x + u.root;
    r.spread = M::sqrt(x > T(0) ? x : x * T(0));
    r.divisor = r.spread + u.eps;
    r.d = r.scaled = quotient<M>(r.g, r.divisor);
    if (u.has(kUpdateMomentum)) r.d = buffer_of(u, s) = u.momentum * buffer_of(u, s) + r.scaled;
  } else {
    r.d = r.g;
    if (u.has(kUpdateMomentum)) {
      s[0] = u.first ? r.g : u.momentum * s[0] + u.fresh * r.g;
      r.d = u.has(kUpdateNesterov) ? r.g + u.momentum * s[0] : s[0];
    }
  }
  const V kept = u.has(kUpdateDecoupled) ? theta - alpha * u.decay * theta : theta;
  r.theta = kept - alpha * r.d;
  return r;
}

template <class M>
struct UpdateAdjoint {
  typename M::Value g, theta, alpha;  // cotangents of the gradient, the parameter, the rate
};

// From the cotangents of theta' (`lambda`) and of the moments after the step (`mu`, in place) to those before it.
// `s` are the moments before the step; hyper [kHyperCount] gets the numbers' cotangents added.
template <class M>
MTMLK_ANYWHERE UpdateAdjoint<M> update_adjoint(const UpdateStep<typename M::Scalar>& u, typename M::Value alpha,
                                               typename M::Value theta, typename M::Value g, const typename M::Value* s,
                                               typename M::Value lambda, typename M::Value* mu,
                                               typename M::Value* hyper) {
  using T = typename M::Scalar;
  using V = typename M::Value;
  V after[kMaxMoments] = {s[0], s[1], s[2]};
  const Updated<M> r = update_forward<M>(u, alpha, theta, g, after);
  const bool decoupled = u.has(kUpdateDecoupled);
  const V dbar = -alpha * lambda, zero = lambda * T(0);
  V gbar = dbar;
  if (u.rule == kAdam) {
    const V over = quotient<M>(dbar, r.divisor), mbar = mu[0] + over * u.bias1, away = -over * r.d;
    const V xbar = r.spread > T(0) ? away / (T(2) * r.spread) : zero;
    const V vbar = mu[1] + xbar * u.bias2;
    gbar = u.rest1 * mbar + T(2) * u.rest2 * r.g * vbar;
    hyper[kHyperEps] += away;
    hyper[kHyperRoot] += xbar;
    hyper[kHyperBeta1] += mbar * (s[0] - r.g) + over * r.m * T(u.slope1);
    hyper[kHyperBeta2] += vbar * (s[1] - r.g * r.g) + xbar * r.v * T(u.slope2);
    mu[0] = u.beta1 * mbar;
    mu[1] = u.beta2 * vbar;
  } else if (u.rule == kRmsprop) {
    const bool centered = u.has(kUpdateCentered);
    V qbar = dbar;
    if (u.has(kUpdateMomentum)) {
      qbar = buffer_of(u, mu) + dbar;
      hyper[kHyperMomentum] += qbar * (centered ? s[2] : s[1]);
      buffer_of(u, mu) = u.momentum * qbar;
    }
    const V over = quotient<M>(qbar, r.divisor), away = -over * r.scaled;
    const V xbar = r.spread > T(0) ? away / (T(2) * r.spread) : zero;
    const V vbar = mu[0] + xbar;
    gbar = over + T(2) * u.rest2 * r.g * vbar;
    hyper[kHyperEps] += away;
    hyper[kHyperRoot] += xbar;
    hyper[kHyperBeta2] += vbar * (s[0] - r.g * r.g);
    mu[0] = u.beta2 * vbar;
    if (centered) {
      const V abar = mu[1] - T(2) * r.m * xbar;
      gbar += u.rest2 * abar;
      hyper[kHyperBeta2] += abar * (s[1] - r.g);
      mu[1] = u.beta2 * abar;
    }
  } else if (u.has(kUpdateMomentum)) {
    const bool nesterov = u.has(kUpdateNesterov);
    const V bbar = mu[0] + (nesterov ? u.momentum * dbar : dbar);
    if (nesterov) hyper[kHyperMomentum] += dbar * after[0];
    gbar = nesterov ? dbar : zero;
    if (u.first) {
      gbar += bbar;
      mu[0] = zero;
    } else {
      gbar += u.fresh * bbar;
      hyper[kHyperMomentum] += bbar * s[0];
      hyper[kHyperDampening] += -bbar * r.g;
      mu[0] = u.momentum * bbar;
    }
  }
  V alpha_bar = -r.d * lambda, theta_bar = lambda;
  if (decoupled) {
    alpha_bar -= u.decay * theta * lambda;
    theta_bar -= alpha * u.decay * lambda;
    if (u.has(kUpdateDecayed)) hyper[kHyperDecay] += -alpha * theta * lambda;
  } else {
    theta_bar += u.decay * gbar;
    if (u.has(kUpdateDecayed)) hyper[kHyperDecay] += gbar * theta;
  }
  return {gbar, theta_bar, alpha_bar};
}

}  // namespace mtmlk
