// The way back through one task of a linear head's inner loop; formulas in task.h.
#pragma once

#include <stdint.h>

#include "simd/dots.h"
#include "simd/gemm.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "runtime/stops.h"
#include "head_inner_loop/features.h"
#include "head_inner_loop/loss.h"
#include "head_inner_loop/task.h"

namespace mtmlk {
namespace {

template <class T>
T head_dot(const T* a, const T* b, int64_t n) {
  VecOf<T> sum = {};
  for (int64_t j = 0; j < n; j += Simd<T>::kLanes) sum = multiply_add<T>(load<T>(a + j), load<T>(b + j), sum);
  return sum_lanes<T>(sum);
}

// What dz [C, ls] of step k gives to Z_s, b, u and v.
template <class T>
void head_base_reverse(const HeadTask<T>& t, int64_t k, const T* dz) {
  const T *u = t.left(0, k), *v = t.left(t.groups - 1, k);
  for (int64_t c = 0; c < t.C; ++c) {
    for (int64_t j = c * t.ls; j < (c + 1) * t.ls; j += Simd<T>::kLanes)
      store<T>(t.dzs + j, multiply_add<T>(splat<T>(u[c]), load<T>(dz + j), load<T>(t.dzs + j)));
    if (t.groups == 1 && !t.decays()) continue;  // u stays 1, and db is the sum of dZ_s
    const T sum = head_sum<T>(dz + c * t.ls, t.ls);
    t.du[c] += head_dot<T>(dz + c * t.ls, t.zs + c * t.ls, t.ls);
    if (t.groups == 2) t.du[t.C + c] += t.bias()[c] * sum, t.dbias[c] += v[c] * sum;
  }
}

// dq, and what it gives to A_K, B_K, u_K, v_K and b. Without cotangents: of the task's own loss.
template <class T>
void HeadTask<T>::reverse_query(int64_t task) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const bool asked = call->grad_loss || call->grad_logits || call->grad_support_losses || call->grad_coefficients;
  const T scale = !call->query_y ? T(0) : call->grad_loss ? static_cast<const T*>(call->grad_loss)[task] : T(!asked);
  const T *outer = static_cast<const T*>(call->grad_logits), *v = left(groups - 1, K);
  for (int64_t c = 0; c < C; ++c)
    for (int64_t j = 0; j < lq; j += kLanes) {
      const int64_t at = c * lq + j;
      const VecOf<T> r = load<T>(query_loss.w + j) * (load<T>(query + at) - load<T>(query_loss.y + at));
      store<T>(query + at, call->query_y && scale != T(0) ? scale * r : VecOf<T>{});
    }
  for (int64_t q = 0; outer && q < Q; ++q)
    for (int64_t c = 0; c < C; ++c) query[c * lq + q] += outer[(task * Q + q) * C + c];
  if (Q == 0) return;
  fill_zero<T>(pulled, C * ld), fill_zero<T>(x, C * ls);
  add_rows<T, false>(query, lq, C, T(1), queries(task), Q, D, rows, pulled, ld);
  row_dots<T>({features(task), D, S}, {pulled, ld, C}, D, x, ls, 1);
  for (int64_t c = 0; c < C; ++c) {
    const T sum = head_sum<T>(query + c * lq, lq), shift = bias() ? bias()[c] * sum : T(0);
    const T to_a = joint() ? sum : T(0);  // padding of dA is never read
    for (int64_t j = 0; j < ls; j += kLanes) {
      T* a = da + c * wide + j;
      store<T>(a, load<T>(a) - load<T>(x + c * ls + j) - to_a);
      if (groups == 2) store<T>(a + ls, load<T>(a + ls) - sum);
    }
    if (decays())
      for (int64_t d = 0; d < D; ++d) du[c] += pulled[c * ld + d] * weight()[c * D + d];
    du[(groups - 1) * C + c] += shift;
    dbias[c] += v[c] * sum;
  }
}

template <class T>
void HeadTask<T>::reverse_step(int64_t task, int64_t k) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const T m = T(call->decay + call->proximal), proximal = T(call->proximal);
  const T* outer = static_cast<const T*>(call->grad_support_losses);
  T *p = probs + k * C * ls, *a = stack + k * C * wide;
  fill_zero<T>(x, C * ls);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = 0; c < C; ++c) {
      const T alpha = rate(g, k)[c], kept = keep(g, k)[c];
      VecOf<T> sum = {};
      for (int64_t j = 0; j < ls; j += kLanes) {
        const int64_t at = c * ls + j, in = c * wide + g * ls + j;
        const VecOf<T> r = load<T>(support_loss.w + j) * (load<T>(p + at) - load<T>(support_loss.y + at));
        const VecOf<T> d = load<T>(da + in);
        sum = multiply_add<T>(d, r - m * load<T>(a + in), sum);
        store<T>(x + at, multiply_add<T>(splat<T>(alpha), d, load<T>(x + at)));
        store<T>(da + in, kept * d);
      }
      T& du_c = du[g * C + c];
      drate[(g * K + k) * C + c] =
          (call->needs_rates ? sum_lanes<T>(sum) : T(0)) + du_c * (proximal - m * left(g, k)[c]);
      du_c *= kept;
    }
  head_curve<T>(support_loss, x, outer ? outer[k * call->tasks + task] : T(0), p);
  head_base_reverse<T>(*this, k, p);
  if (k == 0) return;  // A_0 is no variable
  Gemm<T> to_a = {da, wide, da, wide, T(-1), nullptr, 0, {p, ls, gram, ls, S}, {}};
  multiply_rows<T, false>(C, ls, to_a);
  if (groups == 2) {
    Gemm<T> to_b = {da + ls, wide, da + ls, wide, T(-1), nullptr, 0, {p, ls, ones, 0, S}, {}};
    multiply_rows<T, false>(C, ls, to_b);
  }
}

// After adapt and judge: the gradients in the small space.
template <class T>
void HeadTask<T>::reverse(int64_t task) {
  const T* outer = static_cast<const T*>(call->grad_coefficients);
  fill_zero<T>(da, C * wide), fill_zero<T>(dzs, C * ls);
  for (int64_t i = 0; i < groups * C; ++i) du[i] = T(0);
  for (int64_t c = 0; c < C; ++c) dbias[c] = T(0);
  for (int64_t g = 0; outer && g < groups; ++g)
    for (int64_t c = 0; c < C; ++c)
      for (int64_t s = 0; s < S; ++s) da[c * wide + g * ls + s] = outer[((task * groups + g) * C + c) * S + s];
  reverse_query(task);
  for (int64_t k = K - 1; k >= 0 && !stops(watch); --k) reverse_step(task, k);
  const int64_t later = K > 1 ? (K - 1) * C : 0;  // dG = -sum_k A_k^T dz_k as one product; A_0 = 0
  Gemm<T> to_gram = {dgram, ls, nullptr, 0, T(-1), nullptr, 0, {stack + C * wide, wide, probs + C * ls, ls, later}, {}};
  multiply_rows<T, true>(S, ls, to_gram);
  for (int64_t c = 0; groups == 1 && c < C; ++c) dbias[c] += head_sum<T>(dzs + c * ls, ls);
}

}  // namespace
}  // namespace mtmlk
