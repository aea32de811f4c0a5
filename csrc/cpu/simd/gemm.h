// Matrix products of the engine.
//
//   C[m, n] = D[m, n] + beta * (sum_k A1[m, k] B1[k, n] + sum_k A2[m, k] B2[k, n])
//
// B rows are whole aligned vectors; A is read element by element (broadcast), so it needs no padding and may be the
// user's own tensor. Two layouts of A: rows (A[m * lda + k], forward and input gradients) and columns (A[k * lda + m],
// weight gradients). The second pair is the product rule of the tangents; k = 0 switches it off. D = nullptr is zero,
// ldd = 0 repeats one row (a bias).
//
// A packed weight [K, N] is a sequence of panels of up to kPanelVecs vectors of columns: panel p holds its K rows one
// after another, so that a tile streams it, and elementwise updates see one flat buffer.
#pragma once

#include <stdint.h>

#include "simd/simd.h"

namespace mtmlk {
namespace {

// With a gate, C keeps only the elements whose gate is positive or NaN (relu, and relu's slope); gate == c means C
// itself. One struct is filled in by the caller and stepped through in place: a copy right after the scalar stores
// would stall.

template <class T>
struct Product {
  const T* a;
  int64_t lda;
  const T* b;
  int64_t ldb;
  int64_t k;
};

template <class T>
struct Gemm {
  T* c;
  int64_t ldc;
  const T* d;
  int64_t ldd;
  T beta;
  const T* gate;
  int64_t ldgate;
  Product<T> p1, p2;
};

// Rows of a register tile that is `vecs` vectors wide. The accumulators plus one row of B and a broadcast have to fit
// in 32 (AVX-512) or 16 registers; at least 8 accumulators hide the latency of two FMA pipes.
constexpr int tile_rows(int vecs) {
#if defined(MTMLK_ISA_AVX512)
  return vecs == 4 ? 6 : vecs == 3 ? 8 : 12;
#else
  return vecs == 2 ? 6 : 8;
#endif
}

template <class T, int R, int V, bool kColumns>
MTMLK_INLINE void accumulate(VecOf<T> (&acc)[R][V], const Product<T>& p) {
  constexpr int kLanes = Simd<T>::kLanes;
  const T* a = p.a;
  const T* b = p.b;
  const int64_t step_a = kColumns ? p.lda : 1;
  const int64_t row_a = kColumns ? 1 : p.lda;
  for (int64_t k = 0; k < p.k; ++k, a += step_a, b += p.ldb) {
    VecOf<T> row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load<T>(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const VecOf<T> x = splat<T>(a[r * row_a]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add<T>(x, row[v], acc[r][v]);
    }
  }
}

template <class T, int R, int V, bool kGated>
MTMLK_INLINE void finish(const Gemm<T>& g, const VecOf<T> (&acc)[R][V]) {
  constexpr int kLanes = Simd<T>::kLanes;
  const VecOf<T> beta = splat<T>(g.beta);
  T* const c = g.c;
  const T *const d = g.d, *const gate = g.gate;
  const int64_t ldc = g.ldc, ldd = g.ldd, ldgate = g.ldgate;
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const VecOf<T> start = d ? load<T>(d + r * ldd + v * kLanes) : VecOf<T>{};
      VecOf<T> value = multiply_add<T>(beta, acc[r][v], start);
      if constexpr (kGated) {
        const VecOf<T> by = gate == c ? value : load<T>(gate + r * ldgate + v * kLanes);
        value = by <= T(0) ? VecOf<T>{} : value;
      }
      store<T>(c + r * ldc + v * kLanes, value);
    }
}

template <class T, int R, int V, bool kColumns>
void tile(const Gemm<T>& g) {
  VecOf<T> acc[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = VecOf<T>{};  // "= {}" would clear memory, 16 % of a short product
  accumulate<T, R, V, kColumns>(acc, g.p1);
  if (g.p2.k) accumulate<T, R, V, kColumns>(acc, g.p2);
  if (!kColumns && g.gate)
    finish<T, R, V, true>(g, acc);
  else
    finish<T, R, V, false>(g, acc);
}

template <class T>
using TileFn = void (*)(const Gemm<T>&);

// Heights beyond a panel's own are never asked for; they are not compiled either.
template <int V>
constexpr int built_rows(int rows) {
  return rows <= tile_rows(V) ? rows : 1;
}

template <class T, int V, bool kColumns>
TileFn<T> tile_of(int rows) {
  static constexpr TileFn<T> kTiles[12] = {
      tile<T, 1, V, kColumns>,
      tile<T, 2, V, kColumns>,
      tile<T, 3, V, kColumns>,
      tile<T, 4, V, kColumns>,
      tile<T, 5, V, kColumns>,
      tile<T, 6, V, kColumns>,
      tile<T, built_rows<V>(7), V, kColumns>,
      tile<T, built_rows<V>(8), V, kColumns>,
      tile<T, built_rows<V>(9), V, kColumns>,
      tile<T, built_rows<V>(10), V, kColumns>,
      tile<T, built_rows<V>(11), V, kColumns>,
      tile<T, built_rows<V>(12), V, kColumns>,
  };
  return kTiles[rows - 1];
}

// M rows in tiles of nearly equal height (10 rows are 5 + 5, not 8 + 2: a short tile starves the pipes).
template <class T, int V, bool kColumns>
void tiles(int m, Gemm<T>& g) {
  if (m <= tile_rows(V)) return tile_of<T, V, kColumns>(m)(g);
  const int count = (m + tile_rows(V) - 1) / tile_rows(V);
  const int base = m / count, longer = m % count;
  T* const c = g.c;
  const T *const d = g.d, *const gate = g.gate, *const a1 = g.p1.a, *const a2 = g.p2.a;
  for (int i = 0, row = 0; i < count; ++i) {
    const int rows = base + (i < longer);
    tile_of<T, V, kColumns>(rows)(g);
    row += rows;
    g.c = c + row * g.ldc;
    if (d) g.d = d + row * g.ldd;
    if (gate) g.gate = gate + row * g.ldgate;
    g.p1.a = a1 + row * (kColumns ? 1 : g.p1.lda);
    if (a2) g.p2.a = a2 + row * (kColumns ? 1 : g.p2.lda);
  }
  g.c = c, g.d = d, g.gate = gate, g.p1.a = a1, g.p2.a = a2;
}

// Rounding errors grow with the length of a chain of additions: longer products are summed in parts, of which the rows of
// B stay in the first-level cache while tiles pass over them. At depth 512 a panel of four vectors is 128 KiB: from the
// second-level cache for every tile, it held an Intel Xeon's tiles to half of their speed (a Zen 5's to 98 %).
constexpr int64_t kChain = 256;
constexpr int64_t kPartBytes = 32 << 10;

constexpr int64_t part_depth(int vecs) {
  const int64_t rows = kPartBytes / (vecs * kVecBytes);
  return rows < kChain ? rows : kChain;
}

// C = D + beta sums, for sums [m, V vectors]
template <class T, int V>
void finish_rows(int m, const T* sums, Gemm<T> g) {
  constexpr int64_t kWidth = V * Simd<T>::kLanes;
  for (int r = 0; r < m; ++r) {
    VecOf<T> row[1][V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[0][v] = load<T>(sums + r * kWidth + v * Simd<T>::kLanes);
    g.gate ? finish<T, 1, V, true>(g, row) : finish<T, 1, V, false>(g, row);
    g.c += g.ldc;
    if (g.d) g.d += g.ldd;
    if (g.gate) g.gate += g.ldgate;
  }
}

// Rows whose sums wait for the next part, 24 KiB at most: whole tiles of each height.
constexpr int kDeepRows = 96;

template <class T, int V, bool kColumns>
void deep_panel(int m, Gemm<T> g) {
  constexpr int64_t kWidth = V * Simd<T>::kLanes, kDepth = part_depth(V);
  T sums[kDeepRows * kWidth] __attribute__((aligned(kVecBytes)));
  Product<T>* const products[2] = {&g.p1, &g.p2};
  for (int row = 0; row < m; row += kDeepRows) {
    const int rows = m - row < kDeepRows ? m - row : kDeepRows;
    Gemm<T> part = {sums, kWidth, nullptr, kWidth, T(1), nullptr, 0, {}, {}};
    for (Product<T>* p : products) {
      for (int64_t k = 0; k < p->k; k += kDepth) {
        const T* a = p->a + k * (kColumns ? p->lda : 1);
        part.p1 = {a, p->lda, p->b + k * p->ldb, p->ldb, p->k - k < kDepth ? p->k - k : kDepth};
        tiles<T, V, kColumns>(rows, part);
        part.d = sums;
      }
      p->a += rows * (kColumns ? 1 : p->lda);
    }
    finish_rows<T, V>(rows, sums, g);
    g.c += rows * g.ldc;
    if (g.d) g.d += rows * g.ldd;
    if (g.gate) g.gate += rows * g.ldgate;
  }
}

template <class T, int V, bool kColumns>
void panel(int m, Gemm<T>& g) {
  if (__builtin_expect(g.p1.k > kChain || g.p2.k > kChain, 0)) return deep_panel<T, V, kColumns>(m, g);
  tiles<T, V, kColumns>(m, g);
}

template <class T, bool kColumns>
void panel_any(int vecs, int64_t m, Gemm<T>& g) {
  switch (vecs) {
    case 1:
      return panel<T, 1, kColumns>(int(m), g);
    case 2:
      return panel<T, 2, kColumns>(int(m), g);
#if defined(MTMLK_ISA_AVX512)
    case 3:
      return panel<T, 3, kColumns>(int(m), g);
    default:
      return panel<T, 4, kColumns>(int(m), g);
#else
    default:
      return;
#endif
  }
}

MTMLK_INLINE int panel_vecs(int64_t vecs_left) { return int(vecs_left < kPanelVecs ? vecs_left : kPanelVecs); }

// Where B, C and D lie as plain rows, the next panel is `width` further on; packed, all rows of this one.
template <class T>
MTMLK_INLINE void next_columns(Gemm<T>& g, int64_t width, int64_t c_step, int64_t b1_step, int64_t b2_step) {
  g.c += c_step;
  if (g.d) g.d += c_step;
  if (g.gate) g.gate += width;
  g.p1.b += b1_step;
  if (g.p2.k) g.p2.b += b2_step;
}

// C [M, N] rows from A [M, K] rows and packed B [K, N]; `n` is padded to vectors, the b's ldb is ignored.
template <class T>
void multiply_packed(int64_t m, int64_t n, Gemm<T>& g) {
  if (m == 0) return;
  for (int64_t col = 0; col < n;) {
    const int vecs = panel_vecs((n - col) / Simd<T>::kLanes);
    const int64_t width = vecs * Simd<T>::kLanes;
    g.p1.ldb = g.p2.ldb = width;
    panel_any<T, false>(vecs, m, g);
    next_columns(g, width, width, g.p1.k * width, g.p2.k * width);
    col += width;
  }
}

// The same, with the second B in plain rows.
template <class T>
void multiply_packed_and_rows(int64_t m, int64_t n, Gemm<T>& g) {
  if (m == 0) return;
  for (int64_t col = 0; col < n;) {
    const int vecs = panel_vecs((n - col) / Simd<T>::kLanes);
    const int64_t width = vecs * Simd<T>::kLanes;
    g.p1.ldb = width;
    panel_any<T, false>(vecs, m, g);
    next_columns(g, width, width, g.p1.k * width, width);
    col += width;
  }
}

// Packed C [M, N] = A^T B: the gradient of a packed weight; A [rows, M], B [rows, N] with p.k = rows. C and D are
// packed, their ldc and ldd are ignored.
template <class T>
void multiply_transposed(int64_t m, int64_t n, Gemm<T>& g) {
  for (int64_t col = 0; col < n;) {
    const int vecs = panel_vecs((n - col) / Simd<T>::kLanes);
    const int64_t width = vecs * Simd<T>::kLanes;
    g.ldc = g.ldd = width;
    panel_any<T, true>(vecs, m, g);
    next_columns(g, width, m * width, width, width);
    col += width;
  }
}

// C [M, N] = A B, or A^T B, with every matrix in plain rows; `n` is padded.
template <class T, bool kColumns>
void multiply_rows(int64_t m, int64_t n, Gemm<T>& g) {
  if (m == 0) return;
  for (int64_t col = 0; col < n;) {
    const int vecs = panel_vecs((n - col) / Simd<T>::kLanes);
    const int64_t width = vecs * Simd<T>::kLanes;
    panel_any<T, kColumns>(vecs, m, g);
    next_columns(g, width, width, width, width);
    col += width;
  }
}

// C [M, N] = bias + A1 B1^T + A2 B2^T for a handful of columns N: B [N, K] and A [M, K] in rows padded to vectors (p.k
// is the padded K), of which B's padding is zero. One accumulator a row of A, kLanes rows at once, summed together.
template <class T>
void multiply_narrow(int64_t m, int64_t n, T* c, int64_t ldc, const T* bias, const Gemm<T>& g) {
  constexpr int kLanes = Simd<T>::kLanes;
  const Product<T>* products[2] = {&g.p1, &g.p2};
  for (int64_t start = 0; start < m; start += kLanes) {
    const int64_t rows = m - start < kLanes ? m - start : kLanes;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t col = 0; col < ldc; col += kLanes) store<T>(c + (start + r) * ldc + col, VecOf<T>{});
    for (int64_t o = 0; o < n; ++o) {
      VecOf<T> acc[kLanes] = {};
      for (const Product<T>* p : products)
        for (int64_t k = 0; k < p->k; k += kLanes) {
          const VecOf<T> weight = load<T>(p->b + o * p->ldb + k);
          const T* a = p->a + start * p->lda + k;
          for (int r = 0; r < kLanes; ++r)
            acc[r] = multiply_add<T>(load<T>(a + (r < rows ? r : rows - 1) * p->lda), weight, acc[r]);
        }
      T sums[kLanes] __attribute__((aligned(kVecBytes)));
      store<T>(sums, sum_each<T>(acc) + (bias ? bias[o] : T(0)));
      for (int64_t r = 0; r < rows; ++r) c[(start + r) * ldc + o] = sums[r];
    }
  }
}

}  // namespace
}  // namespace mtmlk
