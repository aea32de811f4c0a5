// What all samples of a set share: gradients of weights in tiles of 4 x 4 or 8 x 8, and what becomes of them.
//
//   step     g_l = dz_l^T a_{l-1}      W_l -= rate g_l             the way there
//   start    lambda_l = g_l                                        of the query set
//   back     lambda_l += dzt_l^T a_{l-1} + dz_l^T at_{l-1}         the way back
//   part, part of back: the same sums of some of the samples, for another kernel to add up
//
// A bias is the weight of an input that is 1, whose tangent is 0. Samples are added up in their order.
#pragma once

#include "cuda/inner_loop/mlp/matrix_tile.cuh"
#include "cuda/inner_loop/mlp/task.cuh"
#include "cuda/inner_loop/mlp/tile.cuh"

namespace mtmlk {

enum class Becomes { kStep, kStart, kBack, kPart, kPartOfBack };

MTMLK_ANYWHERE constexpr bool of_way_back(Becomes b) { return b == Becomes::kBack || b == Becomes::kPartOfBack; }
MTMLK_ANYWHERE constexpr bool is_part(Becomes b) { return b == Becomes::kPart || b == Becomes::kPartOfBack; }

// Tiles of a layer, of kSide x kSide elements where it has so many: rows by columns, and with kBias a column more for it.
template <class S, int l, int kSide, bool kBias>
struct LayerTiles {
  static constexpr int kO = S::width(l), kI = S::width(l - 1);
  static constexpr int kHigh = kO < 4 ? kO : least(kO, kSide), kWide = kI < 4 ? kI : least(kI, kSide);
  static constexpr int kRows = (kO + kHigh - 1) / kHigh, kCols = (kI + kWide - 1) / kWide + kBias;
  static constexpr int kCount = kRows * kCols;
  // Of a tile of two vectors from one to the other: those of neighbouring threads are neighbours, in different banks.
  static constexpr int kStep = 4 * (kCols - kBias);
};

// Whole vectors, `step` apart, or fewer than four numbers.
template <int kCount, class T>
DEV void read(T (&to)[kCount], const T* at, int step) {
  if constexpr (kCount < 4) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = at[i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const Four<T> x = four(at + i / 4 * step);
      to[i] = x.v[0], to[i + 1] = x.v[1], to[i + 2] = x.v[2], to[i + 3] = x.v[3];
    }
  }
}
// Those of them that begin before `end`.
template <int kCount, class T>
DEV void write(T* at, const T (&x)[kCount], int step, int end) {
  if constexpr (kCount < 4) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) at[i] = x[i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4)
      if (i / 4 * step < end) *reinterpret_cast<Four<T>*>(at + i / 4 * step) = {x[i], x[i + 1], x[i + 2], x[i + 3]};
  }
}

// A tile of a layer's gradient, by one thread.
template <class T, class S, int l, int kSide, bool kBias>
struct GradientTile {
  using Tiles = LayerTiles<S, l, kSide, kBias>;
  static constexpr int kHigh = Tiles::kHigh, kWide = Tiles::kWide;
  static constexpr int kAhead = kSide == 4 ? 5 : 2;
  int o, i, rows, cols;  // where it begins, and what there is from there on
  bool bias;
  T sum[kHigh][kWide];

  DEV explicit GradientTile(int tile) : sum{} {
    const int row = tile / Tiles::kCols, col = tile - row * Tiles::kCols;
    bias = kBias && col == Tiles::kCols - 1;
    o = row * kHigh, i = bias ? 0 : col * least(kWide, 4);
    rows = least(kHigh, Tiles::kO - o), cols = Tiles::kI - i;
  }
  // sum += d^T a; of the bias a is `constant`, the same for every sample.
  DEV void add(const T* d, const T* a, const T* constant, int samples) {
    constexpr int kLdD = row_of(Tiles::kO), kLdA = row_of(Tiles::kI);
    const T *left = d + o, *right = bias ? constant : a + i;
    const int next = bias ? 0 : kLdA, step = bias ? 0 : Tiles::kStep;
#pragma unroll kAhead
    for (int n = 0; n < samples; ++n, left += kLdD, right += next) {
      T x[kHigh], y[kWide];
      read(x, left, 4), read(y, right, step);
#pragma unroll
      for (int h = 0; h < kHigh; ++h)
#pragma unroll
        for (int w = 0; w < kWide; ++w) sum[h][w] += x[h] * y[w];
    }
  }
};

// kBias: whether biases are among the tiles.
template <class T, class S, int kSide, bool kBias = true>
struct Weights {
  const MlpTask<T, S>& t;
  const MlpStep<T, S>& step;
  OnChip<T> x;
  int samples;

  template <int l>
  using Tile = GradientTile<T, S, l, kSide, kBias>;

  template <int l>
  DEV const T* inputs() const {
    if constexpr (l == 1)
      return x;
    else
      return step.plane(S::kA, l - 1);
  }

  // Rows kFirst to kFirst + kCount of a tile of theta, of lambda or of a part; what theta was goes to `kept`. All rows
  // are read before the first is written: each read would wait for the write before it.
  template <int l, Becomes kBecomes, int kFirst, int kCount>
  DEV void change(const Tile<l>& g, T* to, T* kept, T rate) const {
    constexpr int kLd = row_of(S::width(l - 1)), kWide = Tile<l>::kWide, kStep = Tile<l>::Tiles::kStep;
    const int from = g.bias ? S::bias(l) + g.o : S::weight(l) + g.o * kLd + g.i, next = g.bias ? 1 : kLd;
    T old[kCount][kWide] = {};
    if constexpr (kBecomes == Becomes::kStep || kBecomes == Becomes::kBack) {
#pragma unroll
      for (int h = 0; h < kCount; ++h) {
        const T* const at = to + from + least(kFirst + h, g.rows - 1) * next;
        if (g.bias)
          old[h][0] = *at;
        else
          read(old[h], at, kStep);
      }
    }
#pragma unroll
    for (int h = 0; h < kCount; ++h) {
      if (kFirst + h >= g.rows) break;
      const int e = from + (kFirst + h) * next;
      T value[kWide];
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        value[w] = g.sum[kFirst + h][w];
        if constexpr (kBecomes == Becomes::kStep) value[w] = old[h][w] - rate * value[w];
        if constexpr (kBecomes == Becomes::kBack) value[w] += old[h][w];
      }
      if (g.bias) {
        if (kBecomes == Becomes::kStep && kept) kept[e] = old[h][0];
        to[e] = value[0];
      } else {
        if (kBecomes == Becomes::kStep && kept) write(kept + e, old[h], kStep, g.cols);
        write(to + e, value, kStep, g.cols);
      }
    }
  }

  template <int l, Becomes kBecomes>
  DEV void tile(int at, int k, T* kept) const {
    constexpr int kHigh = Tile<l>::kHigh;
    Tile<l> g(at);
    if constexpr (of_way_back(kBecomes)) {
      g.add(t.moving.plane(S::kDz, l), inputs<l>(), t.ones, samples);
      if constexpr (l > 1) g.add(step.plane(S::kDz, l), t.moving.plane(S::kA, l - 1), t.ones + kVector, samples);
    } else {
      g.add(step.plane(S::kDz, l), inputs<l>(), t.ones, samples);
    }
    T* const to = is_part(kBecomes) ? kept : static_cast<T*>(kBecomes == Becomes::kStep ? step.at : t.lambda);
    const T rate = kBecomes == Becomes::kStep ? t.rate(k, 2 * l - 2 + g.bias) : T(0);
    change<l, kBecomes, 0, least(4, kHigh)>(g, to, kept, rate);
    if constexpr (kHigh > 4) change<l, kBecomes, 4, kHigh - 4>(g, to, kept, rate);
  }

  // The same on a matrix unit: blocks of 32 x 32, a warp each.
  template <int l>
  static constexpr bool kByWarps = S::kTerms != 0 && S::width(l) % 32 == 0 && S::width(l - 1) % 32 == 0;
  template <int l, Becomes kBecomes>
  DEV void block(int at, T* part) const {
    static_assert(is_part(kBecomes) && !kBias && l > 1, "only parts, and no biases among them");
    constexpr int kO = row_of(S::width(l)), kI = row_of(S::width(l - 1)), kCols = S::width(l - 1) / 32;
    const int o = at / kCols * 32, i = at % kCols * 32;
    const auto from = [&](const MlpValues<T, S>& values) { return values.plane(S::kDz, l) + o; };
    MatrixBlock<T, kO, kI, S::kTerms> g(t.lane());
    g.add(from(of_way_back(kBecomes) ? t.moving : step.values()), inputs<l>() + i, samples);
    if constexpr (of_way_back(kBecomes)) g.add(from(step.values()), t.moving.plane(S::kA, l - 1) + i, samples);
    g.store(part + S::weight(l) + o * kI + i);
  }

  // Biases by themselves, four of them a thread, from thread `at` on: dz (dzt on the way back) added up.
  template <Becomes kBecomes, int l = 1>
  DEV void biases(int at, T* to) const {
    constexpr int kO = S::width(l), kCount = kO < 4 ? kO : 4, kVectors = (kO + 3) / 4;
    const MlpValues<T, S> values = of_way_back(kBecomes) ? t.moving : step.values();
    for (; at < kVectors; at += t.threads) {
      const T* const dz = values.plane(S::kDz, l) + 4 * at;
      T sum[kCount] = {};
#pragma unroll 8
      for (int n = 0; n < samples; ++n) {
        T x[kCount];
        read(x, dz + n * row_of(kO), 4);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[i] += x[i];
      }
      write(to + S::bias(l) + 4 * at, sum, 4, 1);
    }
    if constexpr (l < S::kLayers) biases<kBecomes, l + 1>(at - kVectors, to);
  }

  // Layers one after the other, the tiles of all dealt to the block's threads; a layer begins with a warp, whose lanes
  // would else do two layers' tiles one after the other. `kept`: where theta goes that changes, or where a part does.
  template <Becomes kBecomes, int l = 1>
  DEV void tiles(int at, int k, T* kept) const {
    constexpr int kCount = LayerTiles<S, l, kSide, kBias>::kCount;
    constexpr int kWarps = kByWarps<l> ? S::width(l) * S::width(l - 1) / 1024 : (kCount + 31) / 32;
    for (; at < 32 * kWarps; at += t.threads)
      if constexpr (kByWarps<l>)
        block<l, kBecomes>(at / 32, kept);
      else if (at < kCount)
        tile<l, kBecomes>(at, k, kept);
    if constexpr (l < S::kLayers) tiles<kBecomes, l + 1>(at - 32 * kWarps, k, kept);
  }
};

}  // namespace mtmlk
