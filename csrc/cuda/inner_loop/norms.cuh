// Normalisations on elements, by their statistics (schedule/kernels.py): e = w d, et = w dt + wt d.
#pragma once

#include "cuda/inner_loop/machine.cuh"

namespace mtmlk {

//   xhat = (x - mean) rstd      y = w xhat + b
template <class T>
DEV_CALL void norm_apply(const Machine<T> m, const Instruction i, const Walk walk) {
  const Ref<T> x = m.operand(i, 0), mean = m.operand(i, 1), rstd = m.operand(i, 2), w = m.operand(i, 3),
               b = m.operand(i, 4), xhat = m.operand(i, 5), y = m.operand(i, 6);
  m.each(i, walk, [&](const Place& e) {
    const T value = (x[e] - mean.get(e)) * rstd[e];
    xhat.set(e, value);
    y.set(e, w.get(e, T(1)) * value + b.get(e));
  });
}

//   dx = rstd (e - u1 - xhat u2)
template <class T>
DEV_CALL void norm_back(const Machine<T> m, const Instruction i, const Walk walk) {
  const Ref<T> d = m.operand(i, 0), xhat = m.operand(i, 1), rstd = m.operand(i, 2), u1 = m.operand(i, 3),
               u2 = m.operand(i, 4), w = m.operand(i, 5), dx = m.operand(i, 6);
  m.each(i, walk, [&](const Place& e) { dx[e] = rstd[e] * (w.get(e, T(1)) * d[e] - u1.get(e) - xhat[e] * u2.get(e)); });
}

//   xhat_t = rstd (xt - mt - xhat q)      yt = w xhat_t + wt xhat + bt
template <class T>
DEV_CALL void norm_tangent(const Machine<T> m, const Instruction i, const Walk walk) {
  const Ref<T> xt = m.operand(i, 0), xhat = m.operand(i, 1), rstd = m.operand(i, 2), mt = m.operand(i, 3),
               q = m.operand(i, 4), w = m.operand(i, 5), wt = m.operand(i, 6), bt = m.operand(i, 7),
               moved = m.operand(i, 8), yt = m.operand(i, 9);
  m.each(i, walk, [&](const Place& e) {
    const T value = xt.there() ? rstd[e] * (xt[e] - mt.get(e) - xhat[e] * q.get(e)) : T(0);
    moved.set(e, value);
    yt.set(e, w.get(e, T(1)) * value + wt.get(e) * xhat[e] + bt.get(e));
  });
}

//   dxt = rstd (et - u1t - xhat_t u2 - xhat u2t) - q rstd (rstd (e - u1 - xhat u2))
template <class T>
DEV_CALL void norm_twice(const Machine<T> m, const Instruction i, const Walk walk) {
  const Ref<T> d = m.operand(i, 0), dt = m.operand(i, 1), xhat = m.operand(i, 2), xhat_t = m.operand(i, 3),
               rstd = m.operand(i, 4), q = m.operand(i, 5), u1 = m.operand(i, 6), u2 = m.operand(i, 7),
               u1t = m.operand(i, 8), u2t = m.operand(i, 9), w = m.operand(i, 10), wt = m.operand(i, 11),
               dxt = m.operand(i, 12);
  m.each(i, walk, [&](const Place& e) {
    const T scale = rstd[e], value = xhat[e], weight = w.get(e, T(1)), plain = d.get(e);
    const T et = weight * dt.get(e) + wt.get(e) * plain;
    T inner = et - u1t.get(e) - xhat_t.get(e) * u2.get(e) - value * u2t.get(e);
    if (q.there()) inner -= q[e] * scale * (weight * plain - u1.get(e) - value * u2.get(e));
    dxt[e] = scale * inner;
  });
}

}  // namespace mtmlk
