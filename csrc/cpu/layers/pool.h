// Pooling.
//
//   max       y = x at the winner      yt = xt at the winner      dx[winner] += dy
//   average   y = sum x / n            and the same for yt;       dx[cell] += dy / n
// The winner is the first cell that equals the maximum, or a NaN. Non-overlapping max-pooling behind a normalisation
// runs in norm/batch_group.h instead.
#pragma once

#include <stdint.h>

#include "simd/layout.h"
#include "simd/simd.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/conv/products.h"

namespace mtmlk {
namespace {

struct Cells {
  int64_t first, end, step;
  double size;  // with the padding that PyTorch counts
};

// The cells of output `o` along one axis; `axis` is 0 for rows, 1 for columns.
MTMLK_INLINE Cells pool_cells(const ValuePlan& v, int axis, int64_t o) {
  const int64_t* w = v.window + axis;
  const int64_t size = w[kHeight], outputs = w[kOutHeight];
  if (v.kind == kAdaptiveAvgPool) {
    const int64_t first = o * size / outputs, end = ((o + 1) * size + outputs - 1) / outputs;
    return {first, end, 1, double(end - first)};
  }
  const int64_t step = w[kDilationY], start = o * w[kStrideY] - w[kPadY], stop = start + w[kKernelY] * step;
  const int64_t padded = stop < size + w[kPadY] ? stop : size + w[kPadY];
  const int64_t first = start < 0 ? start + (-start + step - 1) / step * step : start;
  return {first, stop < size ? stop : size, step, double(padded - start)};
}

// Calls body(offset of the output's pixel, rows of cells, columns of cells, divisor) for each output of some samples.
template <class Body>
void each_window(const ValuePlan& v, Range samples, Body body) {
  const int64_t* w = v.window;
  for (int64_t n = samples.first; n < samples.end; ++n)
    for (int64_t oy = 0; oy < w[kOutHeight]; ++oy)
      for (int64_t ox = 0; ox < w[kOutWidth]; ++ox) {
        const Cells y = pool_cells(v, 0, oy), x = pool_cells(v, 1, ox);
        const int64_t inside = ((y.end - y.first + y.step - 1) / y.step) * ((x.end - x.first + x.step - 1) / x.step);
        const bool own = v.kind == kAvgPool && w[kDivisor] > 0;
        const bool counts_padding = v.kind == kAvgPool && w[kDivisor] == 0;
        const double divisor = own ? double(w[kDivisor]) : counts_padding ? y.size * x.size : double(inside);
        body(n, (n * v.rows + oy * w[kOutWidth] + ox) * v.ld, y, x, divisor);
      }
}

template <class Body>
MTMLK_INLINE void each_cell(const ValuePlan& v, int64_t n, const Cells& y, const Cells& x, Body body) {
  const int64_t* w = v.window;
  for (int64_t iy = y.first; iy < y.end; iy += y.step)
    for (int64_t ix = x.first; ix < x.end; ix += x.step) body(((n * w[kHeight] + iy) * w[kWidth] + ix) * v.ld);
}

template <class T>
void max_pool(const ValuePlan& v, const T* x, Range samples, T* y) {
  each_window(v, samples, [&](int64_t n, int64_t at, const Cells& cy, const Cells& cx, double) {
    for (int64_t c = 0; c < v.ld; c += Simd<T>::kLanes) {
      VecOf<T> best = splat<T>(-T(__builtin_inf()));
      each_cell(v, n, cy, cx, [&](int64_t cell) {
        const VecOf<T> value = load<T>(x + cell + c);
        best = ((value > best) | (value != value)) ? value : best;
      });
      store<T>(y + at + c, best);
    }
  });
}

// Calls pick(vector of the cell, mask of the lanes it wins, output) for every cell of every window.
template <class T, class Pick>
void each_winner(const ValuePlan& v, const T* x, const T* y, Range samples, Pick pick) {
  using Mask = IntOf<T>;
  each_window(v, samples, [&](int64_t n, int64_t at, const Cells& cy, const Cells& cx, double) {
    for (int64_t c = 0; c < v.ld; c += Simd<T>::kLanes) {
      const VecOf<T> top = load<T>(y + at + c);
      Mask open = ~Mask{};
      each_cell(v, n, cy, cx, [&](int64_t cell) {
        const VecOf<T> value = load<T>(x + cell + c);
        const Mask wins = ((Mask)(value == top) | (Mask)(value != value)) & open;
        open &= ~wins;
        pick(cell + c, wins, at + c);
      });
    }
  });
}

template <class T>
void average_pool(const ValuePlan& v, const T* x, Range samples, T* y) {
  each_window(v, samples, [&](int64_t n, int64_t at, const Cells& cy, const Cells& cx, double divisor) {
    for (int64_t c = 0; c < v.ld; c += Simd<T>::kLanes) {
      VecOf<T> sum = {};
      each_cell(v, n, cy, cx, [&](int64_t cell) { sum += load<T>(x + cell + c); });
      store<T>(y + at + c, sum / T(divisor));
    }
  });
}

template <class T, Plane kPlane>
void pool_node(const Block<T>& b, const ValuePlan& v) {
  T* out = plane_of(b, v.self, kPlane);
  const T *x = plane_of(b, v.a, kPlane), *primal = plane_of(b, v.a, kPrimal);
  const T* y = plane_of(b, v.self, kPrimal);
  share(b, b.samples, [&](int64_t n, int) {
    const Range one = {n, n + 1};
    if (v.kind != kMaxPool) return average_pool<T>(v, x, one, out);
    if (kPlane == kPrimal) return max_pool<T>(v, x, one, out);
    each_winner<T>(v, primal, y, one, [&](int64_t cell, IntOf<T> wins, int64_t at) {
      store<T>(out + at, wins ? load<T>(x + cell) : load<T>(out + at));
    });
  });
}

template <class T>
void pool_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Targets<T>& to) {
  if (!to.to_a) return;
  const ValuePlan& a = b.plan->values[v.a];
  const T *dy = plane_of(b, v.self, plane), *x = plane_of(b, v.a, kPrimal), *y = plane_of(b, v.self, kPrimal);
  T* dx = plane_of(b, v.a, plane);
  share(b, b.samples, [&](int64_t n, int) {
    const Range one = {n, n + 1};
    if (!v.add_a) fill_zero<T>(dx + n * a.rows * a.ld, a.rows * a.ld);
    if (v.kind == kMaxPool)
      return each_winner<T>(v, x, y, one, [&](int64_t cell, IntOf<T> wins, int64_t at) {
        const VecOf<T> old = load<T>(dx + cell);
        store<T>(dx + cell, wins ? old + load<T>(dy + at) : old);
      });
    each_window(v, one, [&](int64_t sample, int64_t at, const Cells& cy, const Cells& cx, double divisor) {
      for (int64_t c = 0; c < v.ld; c += Simd<T>::kLanes) {
        const VecOf<T> g = load<T>(dy + at + c) / T(divisor);
        each_cell(v, sample, cy, cx, [&](int64_t cell) { store<T>(dx + cell + c, load<T>(dx + cell + c) + g); });
      }
    });
  });
}

template <class T>
constexpr LayerKernels<T> kPoolLayer = {pool_node<T, kPrimal>, pool_node<T, kTangent>, pool_backward<T>};

}  // namespace
}  // namespace mtmlk
