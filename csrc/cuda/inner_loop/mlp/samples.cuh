// What is a sample's own: a warp takes kR rows through all layers, without a barrier of the block.
//
//   forward    z_l = a_{l-1} W_l^T + b_l      a_l = f(z_l)
//   backward   dz_L = c dl/dz_L               da_{l-1} = dz_l W_l                          dz_{l-1} = da_{l-1} f'
//   tangent along v = -rate lambda:
//              zt_l = a_{l-1} v_l^T + at_{l-1} W_l^T + vb_l                                at_l = f' zt_l
//              dzt_L = c d2l zt_L
//              dat_{l-1} = dz_l v_l + dzt_l W_l      dzt_{l-1} = dat_{l-1} f' + da_{l-1} f'' zt_{l-1}
//   and dots = <dz_l, a_{l-1} lambda_l^T>, of which d loss / d rate is made
#pragma once

#include "cuda/inner_loop/mlp/loss.cuh"
#include "cuda/inner_loop/mlp/task.cuh"
#include "cuda/inner_loop/mlp/tile.cuh"
#include "cuda/inner_loop/pointwise.cuh"
#include "mtml/pointwise.h"

namespace mtmlk {

// f, f' and f'' of z. Those that bend are called, not copied into every layer.
template <class T>
DEV_CALL Jet<T> bent_jet(int kind, T z, T c0, T c1) {
  return act_jet<ScalarMath<T>>(kind, z, c0, c1);
}
// Those that do not are z above 0, and below it `low` z.
template <class T>
DEV T straight(T z, T low) {
  return z <= T(0) ? (low == T(0) ? T(0) : low * z) : z;
}
template <class T>
DEV T straight_slope(T z, T low) {
  return z <= T(0) ? low : T(1);
}

template <class T, class S, int kR>
struct Samples {
  using Plane = typename S::Plane;
  const MlpTask<T, S>& t;
  const MlpStep<T, S>& step;  // parameters, and values of the set
  const MlpSet<T>& set;
  int first;  // row

  template <int l>
  DEV T* of(Plane p) const {
    return step.plane(p, l);
  }
  template <int l>
  DEV T* moved(Plane p) const {
    return t.moving.plane(p, l);
  }
  template <int l>
  DEV const T* inputs() const {
    if constexpr (l == 1)
      return set.x;
    else
      return of<l - 1>(S::kA);
  }
  template <int l>
  DEV static constexpr int at(int row, int col) {
    return row * row_of(S::width(l)) + col;
  }
  // f(z), and f' and f'' from what is kept of layer l: z where it bends, else f(z), whose sign is that of z.
  DEV T value_of(T z) const {
    if constexpr (S::kBent)
      return bent_jet(t.call.act, z, T(t.call.c0), T(t.call.c1)).value;
    else
      return straight(z, t.low);
  }
  static constexpr Plane kKept = S::kBent ? S::kZ : S::kA;
  DEV Bend<T> bend_of_kept(T x) const {
    if constexpr (S::kBent) {
      const Jet<T> jet = bent_jet(t.call.act, x, T(t.call.c0), T(t.call.c1));
      return {jet.slope, jet.curvature};
    } else {
      return {straight_slope(x, t.low), T(0)};
    }
  }
  // For products of so many terms, whose results are as wide as layer l.
  template <int l, int kDepth>
  DEV WarpTile<T, kR, S::width(l), kDepth, S::kTerms> tile() const {
    return {t.lane(), first, set.samples};
  }

  // --- forward and backward ------------------------------------------------------------------------------------------

  template <int l = 1>
  DEV void forward() const {
    auto z = tile<l, S::width(l - 1)>();
    z.add_columns(step.bias(l));
    z.template add_nt<S::width(l - 1)>(inputs<l>(), step.weight(l));
    z.elements().each([&](int row, int col, T value, int, int) {
      if constexpr (S::has(S::kZ, l)) of<l>(S::kZ)[at<l>(row, col)] = value;
      if constexpr (l < S::kLayers) of<l>(S::kA)[at<l>(row, col)] = value_of(value);
    });
    __syncwarp();
    if constexpr (l < S::kLayers) forward<l + 1>();
  }

  DEV void losses() const {
    constexpr int kL = S::kLayers;
    const int row = first + t.lane();
    if (t.lane() < kR && row < set.samples) {
      const int e = at<kL>(row, 0);
      t.each[row] =
          sample_loss<T, S::width(kL)>(set, of<kL>(S::kZ) + e, set.target(row, S::width(kL)), of<kL>(S::kDz) + e);
    }
    __syncwarp();
  }

  template <int l = S::kLayers>
  DEV void backward() const {
    if constexpr (l > 1) {
      auto da = tile<l - 1, S::width(l)>();
      const auto kept = da.own.of(of<l - 1>(kKept));
      da.template add_nn<S::width(l)>(of<l>(S::kDz), step.weight(l));
      da.elements().each([&](int row, int col, T value, int i, int j) {
        if constexpr (S::kBent) of<l - 1>(S::kDa)[at<l - 1>(row, col)] = value;
        of<l - 1>(S::kDz)[at<l - 1>(row, col)] = value * bend_of_kept(kept.at[i][j]).slope;
      });
      __syncwarp();
      backward<l - 1>();
    }
  }

  // --- tangents ------------------------------------------------------------------------------------------------------

  template <int l = 1>
  DEV void forward_tangent(int k) const {
    auto zt = tile<l, S::width(l - 1)>();
    const auto kept = zt.own.of(of<l>(l < S::kLayers ? kKept : S::kZ));
    zt.template add_nt<S::width(l - 1)>(inputs<l>(), t.lambda + S::weight(l));
    if (t.call.wants_rates) zt.dot(of<l>(S::kDz), t.dots + S::dots(l), S::kDots);
    zt.scale(-t.rate(k, 2 * l - 2));
    zt.add_columns(t.lambda + S::bias(l), -t.rate(k, 2 * l - 1));
    if constexpr (l > 1) zt.template add_nt<S::width(l - 1)>(moved<l - 1>(S::kA), step.weight(l));
    zt.elements().each([&](int row, int col, T value, int i, int j) {
      if constexpr (S::has(S::kZ, l)) moved<l>(S::kZ)[at<l>(row, col)] = value;
      if constexpr (l < S::kLayers) moved<l>(S::kA)[at<l>(row, col)] = value * bend_of_kept(kept.at[i][j]).slope;
    });
    __syncwarp();
    if constexpr (l < S::kLayers) forward_tangent<l + 1>(k);
  }

  DEV void loss_tangents() const {
    constexpr int kL = S::kLayers;
    const int row = first + t.lane();
    if (t.lane() < kR && row < set.samples) {
      const int e = at<kL>(row, 0);
      sample_loss_tangent<T, S::width(kL)>(set, of<kL>(S::kZ) + e, set.target(row, S::width(kL)), moved<kL>(S::kZ) + e,
                                           moved<kL>(S::kDz) + e);
    }
    __syncwarp();
  }

  template <int l = S::kLayers>
  DEV void backward_tangent(int k) const {
    if constexpr (l > 1) {
      auto dat = tile<l - 1, S::width(l)>();
      const auto kept = dat.own.of(of<l - 1>(kKept));
      dat.template add_nn<S::width(l)>(of<l>(S::kDz), t.lambda + S::weight(l));
      dat.scale(-t.rate(k, 2 * l - 2));
      dat.template add_nn<S::width(l)>(moved<l>(S::kDz), step.weight(l));
      dat.elements().each([&](int row, int col, T value, int i, int j) {
        const Bend<T> f = bend_of_kept(kept.at[i][j]);
        value *= f.slope;
        if constexpr (S::kBent)
          value += of<l - 1>(S::kDa)[at<l - 1>(row, col)] * f.curvature * moved<l - 1>(S::kZ)[at<l - 1>(row, col)];
        moved<l - 1>(S::kDz)[at<l - 1>(row, col)] = value;
      });
      __syncwarp();
      backward_tangent<l - 1>(k);
    }
  }
};

// body(samples) for each kR rows of a set, by the block's warps in turn.
template <int kR, class T, class S, class Body>
DEV void each_rows(const MlpTask<T, S>& t, const MlpStep<T, S>& step, const MlpSet<T>& set, Body body) {
  for (int first = kR * t.warp(); first < set.samples; first += kR * t.warps())
    body(Samples<T, S, kR>{t, step, set, first});
}

}  // namespace mtmlk
