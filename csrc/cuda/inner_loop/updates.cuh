// Updates of parameters, by the formulas of mtml/update.h.
#pragma once

#include "mtml/scalar_math.h"
#include "mtml/update.h"
#include "cuda/inner_loop/machine.cuh"

namespace mtmlk {

// A parameter's operand, which has rows and columns and no samples: half the registers of a Ref, of which there are
// eighteen here.
template <class T>
struct Matrix {
  T* at;
  int r, f;

  DEV Matrix(const Machine<T>& m, const Instruction& i, int which) {
    const Ref<T> ref = m.operand(i, which);
    at = ref.at, r = ref.r, f = ref.f;
  }
  DEV T& operator[](const Place& e) const { return at[e.r * r + e.f * f]; }
  DEV T get(const Place& e) const { return at ? (*this)[e] : T(0); }
  DEV void set(const Place& e, T value) const {
    if (at) (*this)[e] = value;
  }
};

// after = theta - alpha g
template <class T>
DEV void gradient_step(const Machine<T>& m, const Instruction& i, const Walk& walk) {
  const Ref<T> theta = m.operand(i, 0), g = m.operand(i, 1), alpha = m.operand(i, 2), after = m.operand(i, 3);
  m.each(i, walk, [&](const Place& e) { after[e] = theta[e] - alpha[e] * g[e]; });
}

template <class T>
DEV UpdateStep<T> rule_of(const Machine<T>& m, const Instruction& i, int operands) {
  double hyper[kHyperCount];
  const Ref<double> given = m.template operand<double>(i, 3);
#pragma unroll
  for (int h = 0; h < kHyperCount; ++h) hyper[h] = given.at[h];
  return update_at<T>(i.whole(operands, 0), i.whole(operands, 1), hyper, i.whole(operands, 2));
}

// One step: theta, g, alpha, hyper, moments before -> theta and moments after.
template <class T>
DEV_CALL void rule_step(const Machine<T> m, const Instruction i) {
  const UpdateStep<T> u = rule_of(m, i, 11);
  const Matrix<T> theta(m, i, 0), g(m, i, 1), alpha(m, i, 2), after(m, i, 7);
  const Matrix<T> s0(m, i, 4), s1(m, i, 5), s2(m, i, 6);
  const Matrix<T> t0(m, i, 8), t1(m, i, 9), t2(m, i, 10);
  m.each(i, m.whole(i), [&](const Place& e) {
    T s[kMaxMoments] = {s0.get(e), s1.get(e), s2.get(e)};
    const T next = update_forward<ScalarMath<T>>(u, alpha[e], theta[e], g[e], s).theta;
    after.set(e, next);
    t0.set(e, s[0]), t1.set(e, s[1]), t2.set(e, s[2]);
  });
}

// Its adjoint: theta, g, alpha, hyper, moments, lambda, mu -> v, below, nu, what each element sends to its rate, and to
// the eight numbers. Those are added up by one warp, so that they have one order.
template <class T>
DEV_CALL void rule_back(const Machine<T> m, const Instruction i) {
  constexpr int kOperands = 18;
  const UpdateStep<T> u = rule_of(m, i, kOperands);
  const Matrix<T> theta(m, i, 0), g(m, i, 1), alpha(m, i, 2), lambda(m, i, 7);
  const Matrix<T> s0(m, i, 4), s1(m, i, 5), s2(m, i, 6);
  const Matrix<T> mu0(m, i, 8), mu1(m, i, 9), mu2(m, i, 10);
  const Matrix<T> v(m, i, 11), below(m, i, 12), rates(m, i, 16);
  const Matrix<T> nu0(m, i, 13), nu1(m, i, 14), nu2(m, i, 15);
  const Ref<double> to_hyper = m.template operand<double>(i, 17);
  T own[kHyperCount] = {};
  const auto body = [&](const Place& e) {
    const T s[kMaxMoments] = {s0.get(e), s1.get(e), s2.get(e)};
    T mu[kMaxMoments] = {mu0.get(e), mu1.get(e), mu2.get(e)};
    const UpdateAdjoint<ScalarMath<T>> back =
        update_adjoint<ScalarMath<T>>(u, alpha[e], theta[e], g[e], s, lambda.get(e), mu, own);
    v.set(e, back.g), below.set(e, back.theta), rates.set(e, back.alpha);
    nu0.set(e, mu[0]), nu1.set(e, mu[1]), nu2.set(e, mu[2]);
  };
  if (!to_hyper.there()) {
    m.each(i, m.whole(i), body);
  } else if (m.rank < 32) {
    Walk lanes = m.whole(i);
    lanes.first = m.rank, lanes.step = 32;
    m.each(i, lanes, body);
#pragma unroll
    for (int h = 0; h < kHyperCount; ++h) {
      const double sum = warp_sum(double(own[h]));
      if (m.rank == 0) to_hyper.at[h] = sum;
    }
  }
}

// Clipping: scale = min(1, bound / (|g| + eps)) from the squares [count] of each tensor's elements.
template <class T>
DEV double summed(const Ref<T>& x, int count) {
  double sum = 0;
  for (int k = 0; k < count; ++k) sum += double(x.at[k]);
  return sum;
}

template <class T>
DEV_CALL void clip_scale(const Machine<T> m, const Instruction i) {
  if (m.whole(i).first != 0) return;
  const double bound = m.template operand<double>(i, 0).at[kHyperClip];
  const int count = i.whole(3, 0);
  m.operand(i, 2).at[0] = T(clip_factor(summed(m.operand(i, 1), count), bound));
}

// And back: from <h, g> and the squares to `along` in v = scale h + along g, and to the bound (in hyper's place).
template <class T>
DEV_CALL void clip_back(const Machine<T> m, const Instruction i) {
  if (m.whole(i).first != 0) return;
  const double bound = m.template operand<double>(i, 0).at[kHyperClip];
  const int squares = i.whole(6, 0), inners = i.whole(6, 1);
  const bool active = m.operand(i, 1).at[0] != T(1);
  const ClipAdjoint back = clip_adjoint(summed(m.operand(i, 2), squares), summed(m.operand(i, 3), inners), bound);
  m.operand(i, 4).at[0] = active ? T(back.along_g) : T(0);
  const Ref<double> to_hyper = m.template operand<double>(i, 5);
  if (!to_hyper.there()) return;
  for (int h = 0; h < kHyperCount; ++h) to_hyper.at[h] = 0;
  to_hyper.at[kHyperClip] = active ? back.of_bound : 0;
}

}  // namespace mtmlk
