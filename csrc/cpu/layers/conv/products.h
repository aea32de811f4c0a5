// Products of convolutions, channels last, without a matrix of patches.
//
//   gather   c[p, :] = d + sum_tap a1[p + tap, :] W1[tap] + sum_tap a2[p + tap, :] W2[tap]
//   grad     dW[tap] += sum_p a1[p + tap, :]^T b1[p, :] + a2[p + tap, :]^T b2[p, :]
//
// Forward, gather's sources are inputs and W a packed weight [taps * C, O]; for the gradient of the input they are
// gradients of outputs and W its transposed copy [taps * O, C]. The second pair is the product rule of the tangents.
// Which taps an element reads stands in the plan (taps.h). Tiles run along whichever of samples, rows and columns is
// longest: the pixels of small images are few, their samples many.
#pragma once

#include <stdint.h>

#include "simd/gemm.h"
#include "simd/simd.h"
#include "inner_loop/plan/taps.h"

namespace mtmlk {
namespace {

// Where the samples, rows and columns of an image lie.
struct Strides {
  int64_t sample, row, pixel;
};

struct Range {
  int64_t first, end;
};

MTMLK_INLINE Range clipped(int64_t first, int64_t count, int64_t end) {
  return {first, first + count < end ? first + count : end};
}

// Three nested loops over images, of which the innermost is the one that tiles run along.
struct Walk {
  int64_t count[3];
  int64_t c[3], a[3];  // strides of destination and source
};

// The axis along which `tile` rows at a time make the highest tiles. Columns lie closest together: another axis has to
// be a good deal better.
MTMLK_INLINE int highest_tiles(const int64_t* counts, int64_t tile) {
  const auto height = [&](int axis) { return double(counts[axis]) / double((counts[axis] + tile - 1) / tile); };
  int best = 2;
  for (int axis = 1; axis >= 0; --axis)
    if (height(axis) > 1.15 * height(best)) best = axis;
  return best;
}

// Samples [n.first, n.end) and destination rows [y.first, y.end) of a rectangle; `at_c` and `at_a` are where it begins.
MTMLK_INLINE bool walk_rect(const TapRect& r, Range n, Range y, const Strides& c, const Strides& a, int64_t tile,
                            Walk& w, int64_t& at_c, int64_t& at_a) {
  const int64_t before = y.first > r.y ? (y.first - r.y + r.y_step - 1) / r.y_step : 0;
  int64_t rows = y.end > r.y ? (y.end - r.y + r.y_step - 1) / r.y_step : 0;
  rows = (rows < r.y_count ? rows : r.y_count) - before;
  if (rows <= 0) return false;
  at_c = n.first * c.sample + (r.y + before * r.y_step) * c.row + r.x * c.pixel;
  at_a = n.first * a.sample + before * r.y_source_step * a.row;
  const int64_t counts[3] = {n.end - n.first, rows, r.x_count};
  const int64_t to_c[3] = {c.sample, r.y_step * c.row, r.x_step * c.pixel};
  const int64_t to_a[3] = {a.sample, r.y_source_step * a.row, r.x_source_step * a.pixel};
  const int inner = highest_tiles(counts, tile);
  const int order[3] = {inner == 0 ? 1 : 0, inner == 2 ? 1 : 2, inner};
  for (int i = 0; i < 3; ++i) w.count[i] = counts[order[i]], w.c[i] = to_c[order[i]], w.a[i] = to_a[order[i]];
  return true;
}

// ---- tiles ----

// `count` rows in tiles of nearly equal height.
template <class Kind, int V>
void run_panel(int64_t count, typename Kind::Tile t) {
  using Fn = void (*)(const typename Kind::Tile&);
  static constexpr Fn kTiles[12] = {
      Kind::template kTile<1, V>,
      Kind::template kTile<2, V>,
      Kind::template kTile<3, V>,
      Kind::template kTile<4, V>,
      Kind::template kTile<5, V>,
      Kind::template kTile<6, V>,
      Kind::template kTile<built_rows<V>(7), V>,
      Kind::template kTile<built_rows<V>(8), V>,
      Kind::template kTile<built_rows<V>(9), V>,
      Kind::template kTile<built_rows<V>(10), V>,
      Kind::template kTile<built_rows<V>(11), V>,
      Kind::template kTile<built_rows<V>(12), V>,
  };
  const int64_t tiles = (count + tile_rows(V) - 1) / tile_rows(V), base = count / tiles, longer = count % tiles;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t rows = base + (i < longer);
    kTiles[rows - 1](t);
    Kind::template advance<V>(t, rows);
  }
}

// A panel of `vecs` vectors.
template <class Kind>
MTMLK_INLINE void run_tiles(int vecs, int64_t count, const typename Kind::Tile& t) {
  switch (vecs) {
    case 1:
      return run_panel<Kind, 1>(count, t);
    case 2:
      return run_panel<Kind, 2>(count, t);
#if defined(MTMLK_ISA_AVX512)
    case 3:
      return run_panel<Kind, 3>(count, t);
    default:
      return run_panel<Kind, 4>(count, t);
#else
    default:
      return;
#endif
  }
}

// ---- gather ----

template <class T>
struct TapProduct {
  const T* a;  // nullptr: absent
  const T* w;
};

template <class T>
struct TapTile {
  T* c;
  int64_t ldc;
  const T* d;  // nullptr: zero; ldd = 0 repeats one row
  int64_t ldd;
  int64_t lda;
  const TapRect* rect;
  TapProduct<T> p1, p2;
};

template <class T, int R, int V>
MTMLK_INLINE void accumulate_part(VecOf<T> (&acc)[R][V], const TapTile<T>& t, const TapProduct<T>& p, int64_t part) {
  constexpr int64_t kWidth = V * Simd<T>::kLanes;
  const TapRun* run = t.rect->runs + t.rect->parts[part].first;
  for (int64_t i = 0; i < t.rect->parts[part].runs; ++i, ++run)
    accumulate<T, R, V, false>(acc, {p.a + run->source, t.lda, p.w + run->weight_row * kWidth, kWidth, run->k});
}

template <class T, int R, int V>
MTMLK_INLINE void finish_taps(const TapTile<T>& t, const VecOf<T> (&acc)[R][V]) {
  constexpr int kLanes = Simd<T>::kLanes;
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      VecOf<T> value = acc[r][v];
      if (t.d) value += load<T>(t.d + r * t.ldd + v * kLanes);
      store<T>(t.c + r * t.ldc + v * kLanes, value);
    }
}

template <class T, int R, int V>
void long_tap_tile(const TapTile<T>& t) {
  VecOf<T> total[R][V] = {};
  const TapProduct<T>* products[2] = {&t.p1, &t.p2};
  for (const TapProduct<T>* p : products)
    for (int64_t part = 0; p->a && part < t.rect->n_parts; ++part) {
      VecOf<T> acc[R][V];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = VecOf<T>{};
      accumulate_part<T, R, V>(acc, t, *p, part);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) total[r][v] += acc[r][v];
    }
  finish_taps<T, R, V>(t, total);
}

template <class T, int R, int V>
void tap_tile(const TapTile<T>& t) {
  if (t.rect->n_parts > 1) return long_tap_tile<T, R, V>(t);
  VecOf<T> acc[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = VecOf<T>{};
  if (t.rect->n_parts == 1) {
    if (t.p1.a) accumulate_part<T, R, V>(acc, t, t.p1, 0);
    if (t.p2.a) accumulate_part<T, R, V>(acc, t, t.p2, 0);
  }
  finish_taps<T, R, V>(t, acc);
}

template <class T>
struct GatherTiles {
  using Tile = TapTile<T>;
  template <int R, int V>
  static constexpr void (*kTile)(const Tile&) = tap_tile<T, R, V>;
  template <int V>
  static void advance(Tile& t, int64_t rows) {
    t.c += rows * t.ldc;
    if (t.d) t.d += rows * t.ldd;
    if (t.p1.a) t.p1.a += rows * t.lda;
    if (t.p2.a) t.p2.a += rows * t.lda;
  }
};

template <class T>
struct Gather {
  T* c;
  Strides to;
  const T* bias;  // [n], or nullptr
  bool add;       // to what c holds
  Strides from;
  TapProduct<T> p1, p2;
  int64_t weight_rows;
  int64_t n;  // columns, padded
};

template <class T>
void gather(const TapPlan& plan, const Gather<T>& g, Range samples, Range rows) {
  constexpr int kLanes = Simd<T>::kLanes;
  const int tile = tile_rows(panel_vecs(g.n / kLanes));
  for (int64_t i = 0; i < plan.n_rects; ++i) {
    const TapRect& rect = plan.rects[i];
    Walk w;
    int64_t at_c, at_a;
    if (!walk_rect(rect, samples, rows, g.to, g.from, tile, w, at_c, at_a)) continue;
    for (int64_t i0 = 0; i0 < w.count[0]; ++i0)
      for (int64_t i1 = 0; i1 < w.count[1]; ++i1) {
        T* c = g.c + at_c + i0 * w.c[0] + i1 * w.c[1];
        const int64_t a = at_a + i0 * w.a[0] + i1 * w.a[1];
        for (int64_t col = 0; col < g.n;) {
          const int vecs = panel_vecs((g.n - col) / kLanes);
          TapTile<T> t = {c + col, w.c[2], nullptr, 0, w.a[2], &rect, {nullptr, nullptr}, {nullptr, nullptr}};
          if (g.add)
            t.d = t.c, t.ldd = t.ldc;
          else if (g.bias)
            t.d = g.bias + col;
          if (g.p1.a) t.p1 = {g.p1.a + a, g.p1.w + col * g.weight_rows};
          if (g.p2.a) t.p2 = {g.p2.a + a, g.p2.w + col * g.weight_rows};
          run_tiles<GatherTiles<T>>(vecs, w.count[2], t);
          col += vecs * kLanes;
        }
      }
  }
}

// ---- grad ----

template <class T>
struct GradProduct {
  const T *a, *b;  // nullptr: absent
};

template <class T>
struct GradTile {
  T* c;  // [rows, panel]
  GradProduct<T> p1, p2;
  const Walk* walk;  // its c strides are b's
};

template <class T, int R, int V>
void grad_tile(const GradTile<T>& t) {
  constexpr int kLanes = Simd<T>::kLanes;
  VecOf<T> acc[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = VecOf<T>{};
  const Walk& w = *t.walk;
  const GradProduct<T>* products[2] = {&t.p1, &t.p2};
  for (const GradProduct<T>* p : products)
    for (int64_t i0 = 0; p->a && i0 < w.count[0]; ++i0)
      for (int64_t i1 = 0; i1 < w.count[1]; ++i1)
        accumulate<T, R, V, true>(
            acc, {p->a + i0 * w.a[0] + i1 * w.a[1], w.a[2], p->b + i0 * w.c[0] + i1 * w.c[1], w.c[2], w.count[2]});
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* to = t.c + (r * V + v) * kLanes;
      store<T>(to, load<T>(to) + acc[r][v]);
    }
}

template <class T>
struct GradTiles {
  using Tile = GradTile<T>;
  template <int R, int V>
  static constexpr void (*kTile)(const Tile&) = grad_tile<T, R, V>;
  template <int V>
  static void advance(Tile& t, int64_t rows) {
    t.c += rows * V * Simd<T>::kLanes;
    if (t.p1.a) t.p1.a += rows;
    if (t.p2.a) t.p2.a += rows;
  }
};

template <class T>
struct ConvGrad {
  T* c;  // packed [weight_rows, n]
  int64_t weight_rows, n;
  Strides a, b;
  GradProduct<T> p1, p2;
};

// Sums run along one axis without a break: 16 products hide the way to the next row.
constexpr int64_t kLongRun = 16;

// Adds the gradient that the given samples and output rows contribute.
template <class T>
void conv_grad(const TapPlan& plan, const ConvGrad<T>& g, Range samples, Range rows) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t i = 0; i < plan.n_rects; ++i) {
    const TapRect& rect = plan.rects[i];
    Walk w;
    int64_t at_b, at_a;
    if (!walk_rect(rect, samples, rows, g.b, g.a, kLongRun, w, at_b, at_a)) continue;
    for (int64_t r = 0; r < rect.n_runs; ++r) {
      const TapRun& run = rect.runs[r];
      for (int64_t col = 0; col < g.n;) {
        const int vecs = panel_vecs((g.n - col) / kLanes);
        const int64_t width = vecs * kLanes;
        GradTile<T> t = {
            g.c + col * g.weight_rows + run.weight_row * width, {nullptr, nullptr}, {nullptr, nullptr}, &w};
        if (g.p1.a) t.p1 = {g.p1.a + at_a + run.source, g.p1.b + at_b + col};
        if (g.p2.a) t.p2 = {g.p2.a + at_a + run.source, g.p2.b + at_b + col};
        run_tiles<GradTiles<T>>(vecs, run.k, t);
        col += width;
      }
    }
  }
}

}  // namespace
}  // namespace mtmlk
