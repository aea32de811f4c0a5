// Softmax over features, a warp a row.
#pragma once

#include <math.h>

#include "mtml/program.h"
#include "mtml/scalar_math.h"
#include "cuda/inner_loop/machine.cuh"

namespace mtmlk {

// body(element with feature 0, lane) for each row.
template <class T, class Body>
DEV void each_row(const Machine<T>& m, const Instruction& i, Body body) {
  const Space space(i);
  m.each_by_warps(i, i.rows(), [&](int row, int lane) { body(space.at(row, 0), lane); });
}

// The sum over a row's features of body(feature), in every lane.
template <class T, class Body>
DEV T row_sum(int features, int lane, Body body) {
  T sum = 0;
  for (int f = lane; f < features; f += 32) sum += body(f);
  return warp_sum(sum);
}

// max + log sum exp(z - max), and the max.
template <class T, class Body>
DEV T log_sum_exp(int features, int lane, Body z) {
  T most = -INFINITY;
  for (int f = lane; f < features; f += 32) {
    const T value = z(f);
    most = value > most || value != value ? value : most;
  }
  most = warp_max(most);
  const T shift = most == -INFINITY ? T(0) : most;
  const T sum = row_sum<T>(features, lane, [&](int f) { return ScalarMath<T>::exp(z(f) - shift); });
  return shift + ::log(sum);
}

//   forward   y = softmax(x), or its logarithm
template <class T>
DEV_CALL void softmax_forward(const Machine<T> m, const Instruction i) {
  const Ref<T> x = m.operand(i, 0), y = m.operand(i, 1);
  const bool log = i.whole(2, 0) == kLogSoftmax;
  const int features = i.cols();
  each_row(m, i, [&](const Place& e, int lane) {
    const Ref<T> from = x.from(e), to = y.from(e);
    const T norm = log_sum_exp<T>(features, lane, [&](int f) { return from.at[f * from.f]; });
    for (int f = lane; f < features; f += 32) {
      const T value = from.at[f * from.f] - norm;
      to.at[f * to.f] = log ? value : ScalarMath<T>::exp(value);
    }
  });
}

//   backward  dx = y (d - <d, y>);  log: d - exp(y) sum d      tangent  y (xt - <y, xt>);  log: xt - <exp(y), xt>
//   twice     the tangent of backward
template <class T>
DEV_CALL void softmax_derivatives(const Machine<T> m, const Instruction i) {
  const bool twice = i.op() == kSoftmaxTwice, tangent = i.op() == kSoftmaxTangent;
  const bool log = i.whole(twice ? 5 : 3, 0) == kLogSoftmax;
  const int features = i.cols(), at = twice ? 1 : 0;  // operands: [d,] dt, y, [yt,] result
  const Ref<T> d = m.operand(i, at), y = m.operand(i, at + 1), result = m.operand(i, twice ? 4 : 2);
  const Ref<T> plain = twice ? m.operand(i, 0) : Ref<T>{}, yt = twice ? m.operand(i, 3) : Ref<T>{};
  const bool bent = plain.there() && yt.there();
  each_row(m, i, [&](const Place& e, int lane) {
    const Ref<T> dr = d.from(e), yr = y.from(e), to = result.from(e), pr = plain.from(e), tr = yt.from(e);
    const auto p = [&](int f) { return log ? ScalarMath<T>::exp(yr.at[f * yr.f]) : yr.at[f * yr.f]; };
    const auto dv = [&](int f) { return dr.at ? dr.at[f * dr.f] : T(0); };
    T inner = row_sum<T>(features, lane, [&](int f) { return log && !tangent ? dv(f) : dv(f) * p(f); });
    T with_y = 0, with_yt = 0;
    if (bent) {
      with_y = row_sum<T>(features, lane, [&](int f) { return pr.at[f * pr.f] * (log ? T(1) : p(f)); });
      with_yt = row_sum<T>(features, lane, [&](int f) { return pr.at[f * pr.f] * tr.at[f * tr.f]; });
    }
    for (int f = lane; f < features; f += 32) {
      T value = log ? (tangent ? dv(f) - inner : dv(f) - p(f) * inner) : p(f) * (dv(f) - inner);
      if (bent && log) value -= p(f) * tr.at[f * tr.f] * with_y;
      if (bent && !log) value += tr.at[f * tr.f] * (pr.at[f * pr.f] - with_y) - p(f) * with_yt;
      to.at[f * to.f] = value;
    }
  });
}

}  // namespace mtmlk
