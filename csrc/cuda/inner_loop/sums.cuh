// Sums of products over samples, rows and features, each in one order that the shape alone decides: up to
// kSerialSum products by one thread, more by the 32 lanes of a warp.
#pragma once

#include <stdint.h>

#include "mtml/scalar_math.h"
#include "cuda/inner_loop/machine.cuh"

namespace mtmlk {

constexpr int kSerialSum = 32;

// A factor: an operand by the element of the result, and how far its elements are apart along what is summed.
enum FactorWord : int32_t { kFactorN = kOperandSize, kFactorR, kFactorF, kFactorSize };

// What is summed: `count` = n r f points.
struct Points {
  int count;
  Divisor rest, f;  // r f, f

  DEV Points(const int32_t* w) : count(w[0]), rest{w[1], uint32_t(w[2]), w[3]}, f{w[4], uint32_t(w[5]), w[6]} {}
  DEV int along(const int32_t* factor, int point) const {
    const int n = rest.quotient(point), within = point - n * rest.d, r = f.quotient(within);
    return n * factor[kFactorN] + r * factor[kFactorR] + (within - r * f.d) * factor[kFactorF];
  }
};
constexpr int kPointsWords = 7;

// body(point) summed for an element's points, by one thread or by a warp's lanes, then take(sum).
template <class T, class Body, class Take>
DEV void sum_points(const Machine<T>& m, const Instruction& i, const Points& points, Body body, Take take) {
  const Space space(i);
  const Divisor cols = i.divisor(kHeadCols);
  const auto element = [&](int e) {
    const int row = cols.quotient(e);
    return space.at(row, e - row * cols.d);
  };
  if (points.count <= kSerialSum) {
    m.each(i, m.whole(i), [&](const Place& e) {
      T sum = 0;
      for (int p = 0; p < points.count; ++p) sum += body(e, p);
      take(e, sum);
    });
    return;
  }
  m.each_by_warps(i, i.rows() * cols.d, [&](int piece, int lane) {
    const Place e = element(piece);
    T sum = 0;
    for (int p = lane; p < points.count; p += 32) sum += body(e, p);
    sum = warp_sum(sum);
    if (lane == 0) take(e, sum);
  });
}

// A sum of one operand, or of products of two: what most sums are, their factors decoded once.
template <class T, class Take>
DEV void sum_of_pairs(const Machine<T>& m, const Instruction& i, const Points& points, const int32_t* first, bool two,
                      Take take) {
  const int32_t* second = two ? first + kFactorSize : first;
  const Ref<T> a = m.ref(first), b = m.ref(second);
  const int a_n = first[kFactorN], a_r = first[kFactorR], a_f = first[kFactorF];
  const int b_n = second[kFactorN], b_r = second[kFactorR], b_f = second[kFactorF];
  const auto product = [&](const Place& e, int p) {
    const int n = points.rest.quotient(p), within = p - n * points.rest.d, r = points.f.quotient(within);
    const int f = within - r * points.f.d;
    const T x = (&a[e])[n * a_n + r * a_r + f * a_f];
    return two ? x * (&b[e])[n * b_n + r * b_r + f * b_f] : x;
  };
  sum_points(m, i, points, product, take);
}

// y = scale sum over points of the terms, each a product of factors; 0 where `gate` (1 / length) says that the length is
// below eps. Wholes: points, terms, then for each its number of factors; the factors follow the reals (scale, 1 / eps).
template <class T>
DEV void sum_of_products(const Machine<T>& m, const Instruction& i) {
  const int32_t* w = i.words + kHeadSize + 2 * kOperandSize;
  if (m.idle(i, i.rows() * i.cols() * (w[0] <= kSerialSum ? 1 : 32))) return;
  const Points points(w);
  const int terms = w[kPointsWords];
  const int32_t* factors_of = w + kPointsWords + 1;
  const int32_t* first = factors_of + terms + 4;
  const T scale = T(i.real(2, kPointsWords + 1 + terms, 0)), most = T(i.real(2, kPointsWords + 1 + terms, 1));
  const Ref<T> y = m.operand(i, 0), gate = m.operand(i, 1);
  const auto take = [&](const Place& e, T sum) { y[e] = gate.there() && !(gate[e] < most) ? T(0) : scale * sum; };
  if (terms == 1 && factors_of[0] <= 2) return sum_of_pairs(m, i, points, first, factors_of[0] == 2, take);
  const auto body = [&](const Place& e, int p) {
    const int32_t* factor = first;
    T sum = 0;
    for (int t = 0; t < terms; ++t) {
      T product = 1;
      for (int f = 0; f < factors_of[t]; ++f, factor += kFactorSize)
        product *= (&m.ref(factor)[e])[points.along(factor, p)];
      sum += product;
    }
    return sum;
  };
  sum_points(m, i, points, body, take);
}

// mean and (biased) 1 / sqrt(variance + eps), in two passes; without a mean 1 / sqrt(mean of squares + eps), or, of kind
// `unit`, 1 / max(length, eps). Operands: mean, rstd; wholes: points, kind (0, 1, 2); reals: 1 / points, eps; x.
template <class T>
DEV_CALL void moments(const Machine<T> m, const Instruction i) {
  const int32_t* w = i.words + kHeadSize + 2 * kOperandSize;
  const Points points(w);
  const int kind = w[kPointsWords];
  const int32_t* x = w + kPointsWords + 1 + 4;
  const T scale = T(i.real(2, kPointsWords + 1, 0)), eps = T(i.real(2, kPointsWords + 1, 1));
  const Ref<T> mean = m.operand(i, 0), rstd = m.operand(i, 1), value = m.ref(x);
  const auto at = [&](const Place& e, int p) { return (&value[e])[points.along(x, p)]; };
  m.each_by_warps(i, i.rows() * i.cols(), [&](int piece, int lane) {
    const Divisor cols = i.divisor(kHeadCols);
    const int row = cols.quotient(piece);
    const Place e = Space(i).at(row, piece - row * cols.d);
    T centre = 0;
    if (kind == 0) {
      for (int p = lane; p < points.count; p += 32) centre += at(e, p);
      centre = warp_sum(centre) * scale;
    }
    T squares = 0;
    for (int p = lane; p < points.count; p += 32) {
      const T away = at(e, p) - centre;
      squares += away * away;
    }
    squares = warp_sum(squares);
    if (lane != 0) return;
    mean.set(e, centre);
    if (kind == 2) {
      const T length = ScalarMath<T>::sqrt(squares);
      rstd[e] = T(1) / (length < eps ? eps : length);
    } else {
      rstd[e] = ScalarMath<T>::rsqrt(squares * scale + eps);
    }
  });
}

// dw[id] = the sum of d's rows whose id that is, in their order; none for `padding`. Wholes: padding, rows.
template <class T>
DEV_CALL void add_up_by_id(const Machine<T> m, const Instruction i) {
  const Ref<T> d = m.operand(i, 0), dw = m.operand(i, 2);
  const Ref<int64_t> ids = m.template operand<int64_t>(i, 1);
  const int padding = i.whole(3, 0), rows = i.whole(3, 1), of_sample = i.whole(3, 2);
  m.each(i, m.whole(i), [&](const Place& e) {  // e.r: the id
    T sum = 0;
    for (int n = 0, r = 0; n * of_sample + r < rows; r + 1 == of_sample ? (++n, r = 0) : ++r)
      if (ids[{n, r, 0, 0}] == e.r) sum += d[{n, r, 0, e.f}];
    dw[e] = e.r == padding ? T(0) : sum;
  });
}

}  // namespace mtmlk
