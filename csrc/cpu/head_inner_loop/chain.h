// From a task's gradients in the small space to those of the features and the weight.
//
// With P = dq F_q and W_K = u W - A F_s [C, D], both of one task and of a few columns at a time:
//   dF_s = [dG + dG^T  dZ_s^T  -A^T] [F_s; W; P]        dF_q = dq^T W_K        dW = sum_t dZ_s F_s + u P
// A task's carry: the three small matrices [S, S + 2 C], dq^T [Q, C], u [C], db [C], the rates' gradients [groups, K,
// C]. All but A and u are linear in the task's cotangent.
//
// Threads share the columns: each goes through all tasks in order, so dW is summed in task order whatever their number,
// with no copy of it for each task.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/sizes.h"
#include "simd/gemm.h"
#include "simd/simd.h"
#include "runtime/carver.h"
#include "runtime/stops.h"
#include "runtime/watch.h"
#include "head_inner_loop/features.h"
#include "head_inner_loop/task.h"

namespace mtmlk {
namespace {

inline int64_t head_carry_size(const MtmlkHeadCall& c) {
  const int64_t small = c.support * (c.support + 2 * c.classes) + c.query * c.classes;
  return small + 2 * c.classes + c.rate_groups * c.steps * c.classes;
}

template <class T>
void head_carry(const HeadTask<T>& t, T* carry) {
  const T* a = t.stack + t.K * t.C * t.wide;
  for (int64_t s = 0; s < t.S; ++s) {
    for (int64_t i = 0; i < t.S; ++i) *carry++ = t.dgram[s * t.ls + i] + t.dgram[i * t.ls + s];
    for (int64_t c = 0; c < t.C; ++c) *carry++ = t.dzs[c * t.ls + s];
    for (int64_t c = 0; c < t.C; ++c) *carry++ = -a[c * t.wide + s];
  }
  for (int64_t q = 0; q < t.Q; ++q)
    for (int64_t c = 0; c < t.C; ++c) *carry++ = t.query[c * t.lq + q];
  for (int64_t c = 0; c < t.C; ++c) *carry++ = t.left(0, t.K)[c];
  for (int64_t c = 0; c < t.C; ++c) *carry++ = t.dbias[c];
  for (int64_t i = 0; i < t.groups * t.K * t.C; ++i) *carry++ = t.drate[i];
}

// One thread's share of the columns.
template <class T>
struct HeadChain {
  const MtmlkHeadCall* call;
  Watch* watch;
  int64_t begin, end;           // columns
  T *small, *dq;                // a task's [S, S + 2 C] and [Q, C], scaled
  T *rows, *queries, *weights;  // one panel of [F_s; W; P], F_q and W_K
  T *out, *sum;                 // results of one panel before they are cut to size; dW [C, end - begin]

  void carve(Carver& c, const MtmlkHeadCall& given, int64_t from, int64_t to) {
    const int64_t width = kPanelVecs * Simd<T>::kLanes, S = given.support, Q = given.query, C = given.classes;
    call = &given, begin = from, end = to;
    small = c.take<T>(S * (S + 2 * C)), dq = c.take<T>(Q * C);
    rows = c.take<T>((S + 2 * C) * width), queries = c.take<T>(Q * width), weights = c.take<T>(C * width);
    out = c.take<T>((S > Q ? S : Q) * width), sum = c.take<T>(C * round_up(to - from, width));
  }

  void scale(int64_t task);
  void fill(int64_t task, const T* u, int64_t col, int64_t vecs);
  void add_weight(const T* u, int64_t vecs, bool first, T* to, int64_t ld);
  void product(int64_t m, const T* a, int64_t k, const T* b, int64_t vecs, T* to, int64_t col, const T* from,
               int64_t ahead) const;
  void run();
};

// The task's small matrices times its cotangent; A stays.
template <class T>
void HeadChain<T>::scale(int64_t task) {
  const int64_t S = call->support, C = call->classes, k = S + 2 * C;
  const T* carry = static_cast<const T*>(call->carry) + task * head_carry_size(*call);
  const T by = call->grad_loss ? static_cast<const T*>(call->grad_loss)[task] : T(1);
  for (int64_t s = 0; s < S; ++s)
    for (int64_t i = 0; i < k; ++i) small[s * k + i] = (i < S + C ? by : T(1)) * carry[s * k + i];
  for (int64_t i = 0; i < call->query * C; ++i) dq[i] = by * carry[S * k + i];
}

// [F_s; W; P] and W_K of one panel of columns.
template <class T>
void HeadChain<T>::fill(int64_t task, const T* u, int64_t col, int64_t vecs) {
  const int64_t S = call->support, Q = call->query, C = call->classes, D = call->features, k = S + 2 * C;
  const int64_t width = vecs * Simd<T>::kLanes;
  T *w = rows + S * width, *pulled = w + C * width;
  fill_panel<T>(static_cast<const T*>(call->support_x) + task * S * D, S, D, col, width, rows);
  fill_panel<T>(static_cast<const T*>(call->weight), C, D, col, width, w);
  fill_panel<T>(static_cast<const T*>(call->query_x) + task * Q * D, Q, D, col, width, queries);
  Gemm<T> pull = {pulled, width, nullptr, 0, T(1), nullptr, 0, {dq, C, queries, width, Q}, {}};
  panel_any<T, true>(int(vecs), C, pull);
  if (!call->grad_query_x) return;
  for (int64_t c = 0; c < C; ++c)
    for (int64_t j = c * width; j < (c + 1) * width; j += Simd<T>::kLanes) store<T>(weights + j, u[c] * load<T>(w + j));
  Gemm<T> own = {weights, width, weights, width, T(1), nullptr, 0, {small + S + C, k, rows, width, S}, {}};
  panel_any<T, true>(int(vecs), C, own);
}

// to [C, ld] += dZ_s F_s + u P
template <class T>
void HeadChain<T>::add_weight(const T* u, int64_t vecs, bool first, T* to, int64_t ld) {
  const int64_t S = call->support, C = call->classes, width = vecs * Simd<T>::kLanes;
  const T* pulled = rows + (S + C) * width;
  for (int64_t c = 0; c < C; ++c)
    for (int64_t j = 0; j < width; j += Simd<T>::kLanes) {
      const VecOf<T> before = first ? VecOf<T>{} : load<T>(to + c * ld + j);
      store<T>(to + c * ld + j, multiply_add<T>(splat<T>(u[c]), load<T>(pulled + c * width + j), before));
    }
  Gemm<T> g = {to, ld, to, ld, T(1), nullptr, 0, {small + S, S + 2 * C, rows, width, S}, {}};
  panel_any<T, true>(int(vecs), C, g);
}

// Columns col ... of to [m, D] = a [m, k] b [k, width]; straight into place where whole vectors fit there. Meanwhile
// the same rows of `from` and `to` are fetched `ahead` elements on, where the next panel is: pieces of 256 bytes are
// too short for the processor to see a stream in them (they were a sixth of anil_head's chain).
template <class T>
void HeadChain<T>::product(int64_t m, const T* a, int64_t k, const T* b, int64_t vecs, T* to, int64_t col,
                           const T* from, int64_t ahead) const {
  constexpr int64_t kLanes = Simd<T>::kLanes, kLine = 64 / int64_t(sizeof(T));
  const int64_t D = call->features, width = vecs * kLanes, most = tile_rows(int(vecs)), tiles = (m + most - 1) / most;
  const bool fits = D % kLanes == 0 && reinterpret_cast<uintptr_t>(to) % kVecBytes == 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = m * i / tiles, last = m * (i + 1) / tiles;
    for (int64_t r = first; ahead && r < last; ++r)
      for (int64_t j = col + ahead; j < col + ahead + width; j += kLine)
        __builtin_prefetch(from + r * D + j, 0, 2), __builtin_prefetch(to + r * D + j, 1);
    T* c = fits ? to + first * D + col : out + first * width;
    Gemm<T> g = {c, fits ? D : width, nullptr, 0, T(1), nullptr, 0, {a + first * k, k, b, width, k}, {}};
    panel_any<T, false>(int(vecs), last - first, g);
  }
  for (int64_t r = 0; !fits && r < m; ++r)
    for (int64_t j = 0; j < width && col + j < D; j += kLanes)
      __builtin_memcpy(to + r * D + col + j, out + r * width + j,
                       sizeof(T) * size_t(D - col - j < kLanes ? D - col - j : kLanes));
}

template <class T>
void HeadChain<T>::run() {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const int64_t S = call->support, Q = call->query, C = call->classes, D = call->features;
  const int64_t ld = round_up(end - begin, kPanelVecs * kLanes), k = S + 2 * C;
  T *to_support = static_cast<T*>(call->grad_support_x), *to_query = static_cast<T*>(call->grad_query_x);
  T* to_weight = static_cast<T*>(call->grad_weight);
  const T *from_support = static_cast<const T*>(call->support_x), *from_query = static_cast<const T*>(call->query_x);
  for (int64_t t = 0; t < call->tasks; ++t) {
    const T* u = static_cast<const T*>(call->carry) + t * head_carry_size(*call) + S * k + Q * C;
    scale(t);
    for (int64_t col = begin; col < end && !stops(watch);) {
      const int64_t vecs = panel_vecs(round_up(end - col, kLanes) / kLanes), width = vecs * kLanes;
      const bool last = col + width >= end, done = last && t + 1 == call->tasks;
      const auto ahead = [&](int64_t n) { return done ? 0 : last ? n * D + begin - col : width; };
      fill(t, u, col, vecs);
      if (to_query) product(Q, dq, C, weights, vecs, to_query + t * Q * D, col, from_query + t * Q * D, ahead(Q));
      if (to_support) product(S, small, k, rows, vecs, to_support + t * S * D, col, from_support + t * S * D, ahead(S));
      if (to_weight) add_weight(u, vecs, t == 0, sum + (col - begin), ld);
      col += width;
    }
  }
  for (int64_t c = 0; to_weight && c < C; ++c)
    for (int64_t d = begin; d < end; ++d) to_weight[c * D + d] = sum[c * ld + d - begin];
}

}  // namespace
}  // namespace mtmlk
