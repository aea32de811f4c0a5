// Instructions on elements: activations, sums and products of two, moves, look-ups. Formulas: mtml_kernels/schedule/
// kernels.py; an absent operand is 0.
#pragma once

#include <math.h>
#include <stdint.h>

#include "mtml/pointwise.h"
#include "mtml/scalar_math.h"
#include "cuda/inner_loop/machine.cuh"

namespace mtmlk {

// f' and f'' from what was kept of an activation: its output (relu, tanh, sigmoid), else its input.
template <class T>
struct Bend {
  T slope, curvature;
};

template <class T>
DEV Bend<T> bend_of(int kind, T ref, T c0, T c1) {
  using M = ScalarMath<T>;
  if (kind == kRelu) return {slope_of_output<M>(kind, ref, c0), T(0)};
  if (kind == kTanh || kind == kSigmoid) {
    const T slope = slope_of_output<M>(kind, ref, c0);
    return {slope, slope * bend_of_output<M>(kind, ref)};
  }
  const Jet<T> jet = act_jet<M>(kind, ref, c0, c1);
  return {jet.slope, jet.curvature};
}

//   forward  y = f(x)      back  y = d f' (also of a tangent)      twice  y = dt f' + d xt f''
template <class T>
DEV void activations(const Machine<T>& m, const Instruction& i, const Walk& walk) {
  const int operands = i.op() == kActForward ? 2 : i.op() == kActBackward ? 3 : 5;
  const int kind = i.whole(operands, 0);
  const T c0 = T(i.real(operands, 1, 0)), c1 = T(i.real(operands, 1, 1));
  const Ref<T> a = m.operand(i, 0), b = m.operand(i, 1);
  if (i.op() == kActForward) {
    m.each(i, walk, [&](const Place& e) { b[e] = act_jet<ScalarMath<T>>(kind, a[e], c0, c1).value; });
  } else if (i.op() == kActBackward) {
    const Ref<T> y = m.operand(i, 2);
    m.each(i, walk, [&](const Place& e) { y[e] = a[e] * bend_of(kind, b[e], c0, c1).slope; });
  } else {
    const Ref<T> ref = m.operand(i, 2), xt = m.operand(i, 3), y = m.operand(i, 4);
    m.each(i, walk, [&](const Place& e) {
      const Bend<T> bend = bend_of(kind, ref[e], c0, c1);
      T sum = b.get(e) * bend.slope;
      if (a.there() && xt.there()) sum += a[e] * xt[e] * bend.curvature;
      y[e] = sum;
    });
  }
}

// Addition and copy are of double precision where their whole number says so: an update rule's numbers.
//
//   addition  y = a + b                     multiplication  y = c a b
//   two products  y = c (a b + p q), of which a product with an absent factor is 0
//   copy  y = c0 x + c1
template <class T>
DEV void arithmetic(const Machine<T>& m, const Instruction& i, const Walk& walk) {
  const Ref<T> a = m.operand(i, 0), b = m.operand(i, 1);
  if (i.op() == kAddition && i.whole(3, 0)) {
    const Ref<double> first = m.template operand<double>(i, 0), second = m.template operand<double>(i, 1);
    const Ref<double> y = m.template operand<double>(i, 2);
    m.each(i, walk, [&](const Place& e) { y[e] = first[e] + second[e]; });
  } else if (i.op() == kAddition) {
    const Ref<T> y = m.operand(i, 2);
    m.each(i, walk, [&](const Place& e) { y[e] = a[e] + b[e]; });
  } else if (i.op() == kMultiplication) {
    const Ref<T> y = m.operand(i, 2);
    const T c = T(i.real(3, 0, 0));
    m.each(i, walk, [&](const Place& e) { y[e] = c * a[e] * b[e]; });
  } else if (i.op() == kTwoProducts) {
    const Ref<T> p = m.operand(i, 2), q = m.operand(i, 3), y = m.operand(i, 4);
    m.each(i, walk, [&](const Place& e) {
      T sum = a.there() && b.there() ? a[e] * b[e] : T(0);
      if (p.there() && q.there()) sum += p[e] * q[e];
      y[e] = sum;
    });
  } else {
    const double c0 = i.real(2, 1, 0), c1 = i.real(2, 1, 1);
    if (i.whole(2, 0)) {
      const Ref<double> from = m.template operand<double>(i, 0), to = m.template operand<double>(i, 1);
      m.each(i, walk, [&](const Place& e) { to[e] = c0 * from.get(e) + c1; });
    } else {
      m.each(i, walk, [&](const Place& e) { b[e] = T(c0) * a.get(e) + T(c1); });
    }
  }
}

// y = row ids[n, r] of w, or 0 for the id `padding`. Ids out of range are refused before the launch where they are on
// the CPU; here they read NaN.
template <class T>
DEV_CALL void look_up(const Machine<T> m, const Instruction i, const Walk walk) {
  const Ref<int64_t> ids = m.template operand<int64_t>(i, 0);
  const Ref<T> w = m.operand(i, 1), y = m.operand(i, 2);
  const int padding = i.whole(3, 0), table = i.whole(3, 1);
  m.each(i, walk, [&](const Place& e) {
    const int64_t id = ids[{e.n, e.r, 0, 0}];
    const bool known = id >= 0 && id < table;
    y[e] = id == padding ? T(0) : known ? w[{0, int(id), 0, e.f}] : T(NAN);
  });
}

}  // namespace mtmlk
