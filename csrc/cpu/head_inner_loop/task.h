// One task of a linear head's inner loop, in the Gram matrix of its support features. Classes are rows, samples are
// lanes.
//
// Forward, with A = 0, u = v = 1 at first, m = decay + proximal:
//   z_k = u_k Z_s + v_k b - A_k G - B_k 1 1^T        G = F_s F_s^T [S, S], Z_s = W F_s^T [C, S]
//   R_k = w (p(z_k) - y);  A_{k+1} = (1 - alpha_k m) A_k + alpha_k R_k;
//   u_{k+1} = (1 - alpha_k m) u_k + alpha_k proximal;  B, v with beta_k
//   logits^T = W_K F_q^T + v_K b - B_K 1        W_K = u_K W - A_K F_s, of one task at a time
// Where the weight and the bias share their rates, B = A and u = v: 1 1^T is added to G, b to Z_s, and B is gone.
// Without a bias nothing is added.
// Backward, dq the cotangent of the logits, dA, dB the ones of A_K, B_K from outside:
//   P = dq F_q;  dA -= P F_s^T;  dB -= dq 1 1^T;  du = sum_d P W
//   (H = F_s F_q^T has C rows' worth of gradient: P is all that is needed of it)
//   for k = K-1 .. 0:  x = alpha_k dA + beta_k dB;  dz = curvature(p_k) x + s_k R_k
//     dalpha_k = sum_s dA (R_k - m A_k) + du (proximal - m u_k), and dbeta_k
//     dA <- (1 - alpha_k m) dA - dz G;  dB <- (1 - beta_k m) dB - dz 1 1^T;  dZ_s += u_k dz;  dG -= A_k^T dz
//     du <- (1 - alpha_k m) du + sum_s dz Z_s;  dv <- (1 - beta_k m) dv + b sum_s dz;  db += v_k sum_s dz
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/sizes.h"
#include "simd/dots.h"
#include "simd/gemm.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "runtime/carver.h"
#include "runtime/stops.h"
#include "runtime/watch.h"
#include "head_inner_loop/features.h"
#include "head_inner_loop/loss.h"

namespace mtmlk {
namespace {

// What all tasks share.
template <class T>
struct HeadTables {
  T *rate, *keep;  // [groups, K, C]: alpha and 1 - alpha m
  T* left;         // [groups, K + 1, C]: u and v
};

template <class T>
struct HeadTask {
  const MtmlkHeadCall* call;
  const HeadTables<T>* tables;
  Watch* watch;
  int64_t S, Q, C, D, K, groups, ls, lq, ld, wide;  // rows padded to vectors; wide: A and B side by side
  T *packed, *product;                              // [D, S + C] panels; [S, lp] = F_s [F_s; W]^T
  T *own, *pulled, *rows;                           // W_K and P [C, ld]; a panel of features
  T *gram, *ones, *zs, *base;                       // G [S, ls], [ls or lq], Z_s [C, ls], u Z_s + v b
  T *stack, *probs, *query;                         // A_k [K + 1, C, wide]; p_k, then dz_k [K, C, ls]; logits, then dq
  T *da, *x, *dzs, *dgram;                          // [C, wide], [C, ls], [C, ls], [S, ls]
  T *du, *dbias, *drate;                            // [groups, C], [C], [groups, K, C]
  HeadTaskLoss<T> support_loss, query_loss;

  void carve(Carver& c, const MtmlkHeadCall& given);
  void measure(int64_t task);
  void adapt(int64_t task);
  void judge(int64_t task);
  void reverse(int64_t task);
  void reverse_query(int64_t task);
  void reverse_step(int64_t task, int64_t k);

  const T* features(int64_t task) const { return static_cast<const T*>(call->support_x) + task * S * D; }
  const T* queries(int64_t task) const { return static_cast<const T*>(call->query_x) + task * Q * D; }
  const T* weight() const { return static_cast<const T*>(call->weight); }
  const T* bias() const { return static_cast<const T*>(call->bias); }
  const T* rate(int64_t g, int64_t k) const { return tables->rate + (g * K + k) * C; }
  const T* keep(int64_t g, int64_t k) const { return tables->keep + (g * K + k) * C; }
  const T* left(int64_t g, int64_t k) const { return tables->left + (g * (K + 1) + k) * C; }
  bool decays() const { return call->decay != 0; }                 // else u = v = 1
  bool joint() const { return groups == 1 && bias() != nullptr; }  // B = A
};

template <class T>
void HeadTask<T>::carve(Carver& c, const MtmlkHeadCall& given) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  S = given.support, Q = given.query, C = given.classes, D = given.features, K = given.steps;
  groups = given.rate_groups, ls = round_up(S, kLanes), lq = round_up(Q, kLanes), wide = groups * ls;
  ld = round_up(D, kPanelVecs * kLanes);
  const int64_t lp = round_up(S + C, kLanes);
  packed = c.take<T>(D * lp), product = c.take<T>(S * lp);
  own = c.take<T>(C * ld), pulled = c.take<T>(C * ld), rows = c.take<T>((S > Q ? S : Q) * kPanelVecs * kLanes);
  gram = c.take<T>(S * ls), ones = c.take<T>(ls > lq ? ls : lq);
  zs = c.take<T>(C * ls), base = c.take<T>(C * ls);
  stack = c.take<T>((K + 1) * C * wide), probs = c.take<T>(K * C * ls), query = c.take<T>(C * lq);
  da = c.take<T>(C * wide), x = c.take<T>(C * ls), dzs = c.take<T>(C * ls), dgram = c.take<T>(S * ls);
  du = c.take<T>(groups * C), dbias = c.take<T>(C), drate = c.take<T>(groups * K * C);
  support_loss = {given.support_loss.kind, C, ls, c.take<T>(C * ls), c.take<T>(ls)};
  query_loss = {given.query_loss.kind, C, lq, c.take<T>(C * lq), c.take<T>(lq)};
}

// G and Z_s of a task: one product of its support features with themselves and the weight.
template <class T>
void HeadTask<T>::measure(int64_t task) {
  const int64_t lp = round_up(S + C, Simd<T>::kLanes);
  pack_features<T>(features(task), S, weight(), C, D, packed);
  Gemm<T> g = {product, lp, nullptr, 0, T(1), nullptr, 0, {features(task), D, packed, 0, D}, {}};
  multiply_packed<T>(S, lp, g);
  fill_zero<T>(gram, S * ls), fill_zero<T>(zs, C * ls);
  for (int64_t i = 0; i < S; ++i) {
    const T* row = product + i * lp;
    for (int64_t s = 0; s < S; ++s) gram[i * ls + s] = row[s] + T(joint());
    for (int64_t c = 0; c < C; ++c) zs[c * ls + i] = row[S + c] + (joint() ? bias()[c] : T(0));
  }
  for (int64_t i = 0; i < (ls > lq ? ls : lq); ++i) ones[i] = T(1);
}

// base = u_k Z_s + v_k b
template <class T>
void head_base(const HeadTask<T>& t, int64_t k) {
  const T *u = t.left(0, k), *v = t.left(t.groups - 1, k);
  for (int64_t c = 0; c < t.C; ++c) {
    const VecOf<T> shift = splat<T>(t.groups == 1 ? T(0) : v[c] * t.bias()[c]);
    for (int64_t j = c * t.ls; j < (c + 1) * t.ls; j += Simd<T>::kLanes)
      store<T>(t.base + j, multiply_add<T>(splat<T>(u[c]), load<T>(t.zs + j), shift));
  }
}

// z = base - A_k G - B_k 1 1^T; A_0 = 0 is not multiplied.
template <class T>
void head_logits(const HeadTask<T>& t, int64_t k, T* z) {
  const T* a = t.stack + k * t.C * t.wide;
  const int64_t S = k ? t.S : 0;
  const Product<T> shift = {a + t.ls, t.wide, t.ones, 0, t.groups == 2 ? S : 0};
  Gemm<T> g = {z, t.ls, t.base, t.ls, T(-1), nullptr, 0, {a, t.wide, t.gram, t.ls, S}, shift};
  multiply_rows<T, false>(t.C, t.ls, g);
}

template <class T>
void HeadTask<T>::adapt(int64_t task) {
  T* losses = static_cast<T*>(call->support_losses);
  fill_zero<T>(stack, C * wide);
  head_base<T>(*this, 0);
  for (int64_t k = 0; k < K && !stops(watch); ++k) {
    if (k && decays()) head_base<T>(*this, k);
    T *p = probs + k * C * ls, *a = stack + k * C * wide, *next = a + C * wide;
    head_logits<T>(*this, k, p);
    const VecOf<T> loss = head_predict<T>(support_loss, p);
    if (losses) losses[k * call->tasks + task] = sum_lanes<T>(loss);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = 0; c < C; ++c) {
        const VecOf<T> alpha = splat<T>(rate(g, k)[c]), kept = splat<T>(keep(g, k)[c]);
        for (int64_t j = 0; j < ls; j += Simd<T>::kLanes) {
          const VecOf<T> r =
              load<T>(support_loss.w + j) * (load<T>(p + c * ls + j) - load<T>(support_loss.y + c * ls + j));
          const int64_t at = c * wide + g * ls + j;
          store<T>(next + at, multiply_add<T>(alpha, r, kept * load<T>(a + at)));
        }
      }
  }
}

// Logits, coefficients and loss. The logits turn into predictions where there is a loss.
template <class T>
void HeadTask<T>::judge(int64_t task) {
  T *loss = static_cast<T*>(call->loss), *logits = static_cast<T*>(call->logits);
  T* coefficients = static_cast<T*>(call->coefficients);
  const T *a = stack + K * C * wide, *v = left(groups - 1, K);
  if (Q) {
    for (int64_t c = 0; c < C; ++c)
      for (int64_t d = 0; d < ld; d += Simd<T>::kLanes)
        store<T>(own + c * ld + d, d < D ? left(0, K)[c] * load_some<T>(weight() + c * D + d, D - d) : VecOf<T>{});
    add_rows<T, false>(a, wide, C, T(-1), features(task), S, D, rows, own, ld);
    fill_zero<T>(query, C * lq);
    row_dots<T>({queries(task), D, Q}, {own, ld, C}, D, query, lq, 1);
  }
  for (int64_t c = 0; bias() && c < C; ++c) {
    const T shift = v[c] * bias()[c] - head_sum<T>(a + c * wide + (groups - 1) * ls, ls);
    for (int64_t q = 0; q < Q; ++q) query[c * lq + q] += shift;
  }
  for (int64_t q = 0; logits && q < Q; ++q)
    for (int64_t c = 0; c < C; ++c) logits[(task * Q + q) * C + c] = query[c * lq + q];
  for (int64_t g = 0; coefficients && g < groups; ++g)
    for (int64_t c = 0; c < C; ++c)
      for (int64_t s = 0; s < S; ++s) coefficients[((task * groups + g) * C + c) * S + s] = a[c * wide + g * ls + s];
  if (loss) loss[task] = T(0);  // of no samples
  if (!call->query_y) return;
  const VecOf<T> value = head_predict<T>(query_loss, query);
  if (loss) loss[task] = sum_lanes<T>(value);
}

}  // namespace
}  // namespace mtmlk
