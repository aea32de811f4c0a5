// What all samples of a set share: gradients of weights in tiles of 4 x 4, and what becomes of them.
//
//   step     g_l = dz_l^T a_{l-1}      W_l -= rate g_l             the way there
//   start    lambda_l = g_l                                        of the query set
//   back     lambda_l += dzt_l^T a_{l-1} + dz_l^T at_{l-1}         the way back
//
// A bias is the weight of an input that is 1, whose tangent is 0. Samples are added up in their order.
#pragma once

#include "cuda/inner_loop/mlp/task.cuh"
#include "cuda/inner_loop/mlp/tile.cuh"

namespace mtmlk {

enum class Becomes { kStep, kStart, kBack };

// Tiles of a layer: rows by columns, and a column more for the bias.
template <class S, int l>
struct LayerTiles {
  static constexpr int kO = S::width(l), kI = S::width(l - 1);
  static constexpr int kHigh = least(kO, 4), kWide = least(kI, 4);
  static constexpr int kRows = (kO + kHigh - 1) / kHigh, kCols = (kI + kWide - 1) / kWide + 1;
  static constexpr int kCount = kRows * kCols;
};

// Up to four numbers that follow each other.
template <int kCount, class T>
DEV Four<T> some(const T* at) {
  if constexpr (kCount == 4) {
    return four(at);
  } else {
    Four<T> found = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) found.v[i] = at[i];
    return found;
  }
}
template <int kCount, class T>
DEV void put_some(T* at, const Four<T>& x) {
  if constexpr (kCount == 4) {
    *reinterpret_cast<Four<T>*>(at) = x;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) at[i] = x.v[i];
  }
}

// A tile of a layer's gradient, by one thread.
template <class T, class S, int l>
struct GradientTile {
  using Tiles = LayerTiles<S, l>;
  static constexpr int kHigh = Tiles::kHigh, kWide = Tiles::kWide;
  int o, i;
  bool bias;
  T sum[kHigh][4];

  DEV explicit GradientTile(int tile) : sum{} {
    const int row = tile / Tiles::kCols, col = tile - row * Tiles::kCols;
    bias = col == Tiles::kCols - 1;
    o = row * kHigh, i = col * kWide;
  }
  // sum += d^T a; of the bias a is `constant`, the same for every sample.
  DEV void add(const T* d, const T* a, const T* constant, int samples) {
    constexpr int kLdD = row_of(Tiles::kO), kLdA = row_of(Tiles::kI);
    const T *left = d + o, *right = bias ? constant : a + i;
    const int next = bias ? 0 : kLdA;
#pragma unroll 5
    for (int n = 0; n < samples; ++n, left += kLdD, right += next) {
      const Four<T> x = some<kHigh>(left), y = some<kWide>(right);
#pragma unroll
      for (int h = 0; h < kHigh; ++h)
#pragma unroll
        for (int w = 0; w < kWide; ++w) sum[h][w] += x.v[h] * y.v[w];
    }
  }
  DEV Four<T> values(int h) const { return {sum[h][0], sum[h][1], sum[h][2], sum[h][3]}; }
};

template <class T, class S>
struct Weights {
  const MlpTask<T, S>& t;
  const MlpStep<T, S>& step;
  OnChip<T> x;
  int samples;

  template <int l>
  DEV const T* inputs() const {
    if constexpr (l == 1)
      return x;
    else
      return step.plane(S::kA, l - 1);
  }

  // Row h of a tile of theta or lambda; of the bias one number.
  template <int kWide>
  DEV static Four<T> read(const T* at, bool bias) {
    return bias ? some<1>(at) : some<kWide>(at);
  }
  template <int kWide>
  DEV static void write(T* at, bool bias, const Four<T>& x) {
    if (bias)
      put_some<1>(at, x);
    else
      put_some<kWide>(at, x);
  }

  // What theta was goes to `kept`. What is there is read before the sums, of all rows: each read would wait for the write
  // before it.
  template <int l, Becomes kBecomes>
  DEV void tile(int at, int k, T* kept) const {
    GradientTile<T, S, l> g(at);
    constexpr int kLd = row_of(S::width(l - 1)), kHigh = g.kHigh, kWide = g.kWide;
    const int from = g.bias ? S::bias(l) + g.o : S::weight(l) + g.o * kLd + g.i, next = g.bias ? 1 : kLd;
    const int rows = least(kHigh, S::width(l) - g.o);
    T* const to = (kBecomes == Becomes::kStep ? step.at : t.lambda) + from;
    Four<T> old[kHigh];
    if constexpr (kBecomes != Becomes::kStart)
#pragma unroll
      for (int h = 0; h < kHigh; ++h) old[h] = read<kWide>(to + least(h, rows - 1) * next, g.bias);
    if constexpr (kBecomes == Becomes::kBack) {
      g.add(t.moving.plane(S::kDz, l), inputs<l>(), t.ones, samples);
      if constexpr (l > 1) g.add(step.plane(S::kDz, l), t.moving.plane(S::kA, l - 1), t.ones + 4, samples);
    } else {
      g.add(step.plane(S::kDz, l), inputs<l>(), t.ones, samples);
    }
    const T rate = kBecomes == Becomes::kStep ? t.rate(k, 2 * l - 2 + g.bias) : T(0);
#pragma unroll
    for (int h = 0; h < kHigh; ++h) {
      if (h >= rows) break;
      Four<T> value = g.values(h);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (kBecomes == Becomes::kStep) value.v[w] = old[h].v[w] - rate * value.v[w];
        if constexpr (kBecomes == Becomes::kBack) value.v[w] += old[h].v[w];
      }
      if (kBecomes == Becomes::kStep && kept) write<kWide>(kept + from + h * next, g.bias, old[h]);
      write<kWide>(to + h * next, g.bias, value);
    }
  }

  // Layers one after the other, the tiles of all dealt to the block's threads; a layer begins with a warp, whose lanes would
  // else do two layers' tiles one after the other.
  template <Becomes kBecomes, int l = 1>
  DEV void tiles(int at, int k, T* kept) const {
    constexpr int kCount = LayerTiles<S, l>::kCount, kWarps = (kCount + 31) / 32;
    for (; at < 32 * kWarps; at += t.threads)
      if (at < kCount) tile<l, kBecomes>(at, k, kept);
    if constexpr (l < S::kLayers) tiles<kBecomes, l + 1>(at - 32 * kWarps, k, kept);
  }
};

}  // namespace mtmlk
