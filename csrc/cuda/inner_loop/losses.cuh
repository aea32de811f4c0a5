// Losses of samples, a warp a sample, with their derivatives; formulas: schedule/torch_kernels/loss_terms.py. Place j of
// sample n is (g = its row, f = its feature); targets of values lie alike, class ids and weights c are one a sample.
#pragma once

#include <math.h>
#include <stdint.h>

#include "mtml/losses.h"
#include "mtml/program.h"
#include "mtml/scalar_math.h"
#include "cuda/inner_loop/machine.cuh"
#include "cuda/inner_loop/rows.cuh"

namespace mtmlk {

constexpr int64_t kIgnoredLabel = -100;

// Value, derivatives in z, and derivatives in the target y, of an element; `value` of a class is its share.
template <class T>
struct LossElement {
  T value, slope, bend, target_slope, target_bend;  // the bends along zt
};

template <class T, int kKind>
DEV LossElement<T> loss_of_value(T z, T y, T zt, T p0) {
  using M = ScalarMath<T>;
  const auto e = element_loss<M, kKind>(z, y, p0);
  const auto to_target = target_element<M, kKind>(z, e);
  return {e.value, e.slope, e.curvature * zt, to_target.slope, to_target.mixed * zt};
}

// A sample at hand: its operands from its first element on, and what its classes share.
template <class T>
struct LossSample {
  int kind, elements, lane;
  T p0;
  Divisor features;
  Ref<T> z, zt, y;
  int64_t id;               // of class ids; of an ignored one 0
  T norm, mass, mean_move;  // log sum exp z; sum t; <p, zt>

  DEV T of(const Ref<T>& x, int j) const {
    if (!x.at) return T(0);
    const int g = features.quotient(j);
    return x.at[g * x.g + (j - g * features.d) * x.f];
  }
  DEV T p(int j) const { return ScalarMath<T>::exp(of(z, j) - norm); }
  // t = (1 - p0) y + p0 / C
  DEV T t(int j) const {
    const T hit = kind == kCrossEntropy ? T(j == id) : of(y, j);
    return (T(1) - p0) * hit + p0 / T(elements);
  }
  DEV void share() {
    if (!is_of_classes(kind)) return;
    norm = log_sum_exp<T>(elements, lane, [&](int j) { return of(z, j); });
    mass = kind == kCrossEntropy ? T(1) : row_sum<T>(elements, lane, [&](int j) { return t(j); });
    mean_move = zt.at ? row_sum<T>(elements, lane, [&](int j) { return p(j) * of(zt, j); }) : T(0);
  }
  DEV LossElement<T> of_class(int j) const {
    const T log_p = of(z, j) - norm, probability = ScalarMath<T>::exp(log_p), target = t(j);
    const T away = zt.at ? of(zt, j) - mean_move : T(0);
    return {target == T(0) ? T(0) : -target * log_p, mass * probability - target, mass * probability * away,
            (p0 - T(1)) * log_p, (p0 - T(1)) * away};
  }
  DEV LossElement<T> operator()(int j) const {
    if (is_of_classes(kind)) return of_class(j);
    const T prediction = of(z, j), target = of(y, j), move = of(zt, j);
    if (kind == kMse) return loss_of_value<T, kMse>(prediction, target, move, p0);
    if (kind == kBce) return loss_of_value<T, kBce>(prediction, target, move, p0);
    if (kind == kHuber) return loss_of_value<T, kHuber>(prediction, target, move, p0);
    return loss_of_value<T, kL1>(prediction, target, move, p0);
  }
};

// Where the operands of a loss stand among those of its instruction.
struct LossOperands {
  int z, zt, y, c, seed, count;  // -1: it has none
};

// body(sample, element, weight of an element, weight of the sample's mean) for each sample.
template <class T, class Body>
DEV void each_sample(const Machine<T>& m, const Instruction& i, const LossOperands& at, Body body) {
  if (m.idle(i, 32 * i.rows())) return;
  const int kind = i.whole(at.count, 0), elements = i.cols();
  const bool total = i.whole(at.count, 1) != 0, ids = kind == kCrossEntropy;
  const T p0 = T(i.real(at.count, 2, 0)), unit = T(i.real(at.count, 2, 1));
  const T size = total || is_of_classes(kind) ? T(1) : T(elements);
  const Ref<T> z = m.operand(i, at.z), zt = at.zt < 0 ? Ref<T>{} : m.operand(i, at.zt);
  const Ref<T> c = m.operand(i, at.c), y = ids ? Ref<T>{} : m.operand(i, at.y);
  const Ref<int64_t> labels = ids ? m.template operand<int64_t>(i, at.y) : Ref<int64_t>{};
  each_row(m, i, [&](const Place& e, int lane) {
    const int64_t label = ids ? labels[e] : 0, id = label == kIgnoredLabel ? 0 : label;
    LossSample<T> s = {kind, elements, lane, p0, i.divisor(kHeadGroup), z.from(e), zt.from(e), y.from(e), id, 0, 0, 0};
    s.share();
    if (id < 0 || id >= elements) s.norm = T(NAN);  // refused before the launch where labels lie on the CPU
    const T weight = c.there() ? c[e] : unit;
    body(s, e, weight / size, T(1) / size);
  });
}

// Writes value j of a sample's row.
template <class T>
DEV void put(const LossSample<T>& s, const Ref<T>& row, int j, T value) {
  const int g = s.features.quotient(j);
  row.at[g * row.g + (j - g * s.features.d) * row.f] = value;
}

//   each_n = l_n      d = c dl/dz
template <class T>
DEV void loss_forward(const Machine<T>& m, const Instruction& i) {
  const Ref<T> each = m.operand(i, 3), d = m.operand(i, 4);
  each_sample(m, i, {0, -1, 1, 2, -1, 5}, [&](const LossSample<T>& s, const Place& e, T weight, T share) {
    const Ref<T> to = d.from(e);
    T sum = 0;
    for (int j = s.lane; j < s.elements; j += 32) {
      const LossElement<T> l = s(j);
      sum += l.value;
      if (to.at) put(s, to, j, weight * l.slope);
    }
    sum = warp_sum(sum);
    if (s.lane == 0) each.set(e, sum * share);
  });
}

//   dt = c (d2l zt + seed dl/dz)
template <class T>
DEV void loss_tangent(const Machine<T>& m, const Instruction& i) {
  const Ref<T> seed = m.operand(i, 4), dt = m.operand(i, 5);
  const T by = seed.there() ? seed.at[0] : T(0);
  each_sample(m, i, {0, 1, 2, 3, 4, 6}, [&](const LossSample<T>& s, const Place& e, T weight, T) {
    const Ref<T> to = dt.from(e);
    for (int j = s.lane; j < s.elements; j += 32) {
      const LossElement<T> l = s(j);
      const T moved = (s.zt.at ? l.bend : T(0)) + (seed.there() ? by * l.slope : T(0));
      put(s, to, j, weight * moved);
    }
  });
}

//   dtarget = c (seed dl/dy + d2l/dydz zt)      dc_n = seed l_n + <dl/dz, zt>
template <class T>
DEV_CALL void loss_data(const Machine<T> m, const Instruction i) {
  const Ref<T> seed = m.operand(i, 4), dtarget = m.operand(i, 5), dc = m.operand(i, 6);
  const T by = seed.there() ? seed.at[0] : T(0);
  each_sample(m, i, {0, 1, 2, 3, 4, 7}, [&](const LossSample<T>& s, const Place& e, T weight, T share) {
    const Ref<T> to = dtarget.from(e);
    T sum = 0;
    for (int j = s.lane; j < s.elements; j += 32) {
      const LossElement<T> l = s(j);
      if (seed.there()) sum += by * l.value;
      if (s.zt.at) sum += l.slope * s.of(s.zt, j);
      const T moved = (s.zt.at ? l.target_bend : T(0)) + (seed.there() ? by * l.target_slope : T(0));
      if (to.at) put(s, to, j, weight * moved);
    }
    sum = warp_sum(sum);
    if (s.lane == 0) dc.set(e, sum * share);
  });
}

// c = w / total (0 where total is 0), or w of a sum of losses; w = mask, 0 of ignored ids. Operands: mask, ids, c, total.
template <class T>
DEV void sample_weights(const Machine<T>& m, const Instruction& i) {
  const Ref<T> mask = m.operand(i, 0), c = m.operand(i, 2), total = m.operand(i, 3);
  const Ref<int64_t> ids = m.template operand<int64_t>(i, 1);
  const bool sum_of_losses = i.whole(4, 0) != 0;
  const auto w = [&](int n) {
    const Place e = {n, 0, 0, 0};
    return ids.there() && ids[e] == kIgnoredLabel ? T(0) : mask.get(e, T(1));
  };
  m.each_by_warps(i, 1, [&](int, int lane) {
    const T sum = row_sum<T>(i.rows(), lane, w);
    if (lane == 0) total.set({0, 0, 0, 0}, sum);
    for (int n = lane; n < i.rows(); n += 32) c[{n, 0, 0, 0}] = sum_of_losses ? w(n) : sum == T(0) ? T(0) : w(n) / sum;
  });
}

// dmask = counts (dc - sum c dc) / total (0 where total is), or counts dc. Operands: dc, c, total, ids, dmask.
template <class T>
DEV_CALL void sample_weights_back(const Machine<T> m, const Instruction i) {
  const Ref<T> dc = m.operand(i, 0), c = m.operand(i, 1), total = m.operand(i, 2), dmask = m.operand(i, 4);
  const Ref<int64_t> ids = m.template operand<int64_t>(i, 3);
  const bool sum_of_losses = i.whole(5, 0) != 0;
  m.each_by_warps(i, 1, [&](int, int lane) {
    T shared = 0, all = 0;
    if (!sum_of_losses) {
      shared = row_sum<T>(i.rows(), lane, [&](int n) { return c[{n, 0, 0, 0}] * dc[{n, 0, 0, 0}]; });
      all = total.at[0];
    }
    for (int n = lane; n < i.rows(); n += 32) {
      const Place e = {n, 0, 0, 0};
      const bool counts = !(ids.there() && ids[e] == kIgnoredLabel);
      const T plain = sum_of_losses ? dc[e] : all == T(0) ? T(0) : (dc[e] - shared) / all;
      dmask[e] = counts ? plain : T(0);
    }
  });
}

}  // namespace mtmlk
