// What the head losses share.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/program.h"
#include "simd/simd.h"
#include "simd/vmath.h"

namespace mtmlk {
namespace {

template <class T>
MTMLK_INLINE IntOf<T> is_plus_zero(VecOf<T> x) {
  return (IntOf<T>)x == 0;
}

// exp(x) for x <= 0, most of the work of a softmax. AVX-512 scales by 2^n in one instruction, subnormal or not.
template <class T>
MTMLK_INLINE VecOf<T> exponential_below(VecOf<T> x) {
#if defined(MTMLK_ISA_AVX512)
  if constexpr (sizeof(T) == 4) {
    // the second operand comes back where one is NaN
    const VecOf<T> low = (VecOf<T>)_mm512_maskz_max_ps(__mmask16(-1), _mm512_set1_ps(-105.f), (__m512)x);
    const VecOf<T> shifted = multiply_add<T>(low, splat<T>(T(1.4426950408889634074)), splat<T>(T(12582912)));
    const VecOf<T> n = shifted - T(12582912);
    VecOf<T> r = multiply_add<T>(n, splat<T>(T(-0.693145751953125)), low);
    r = multiply_add<T>(n, splat<T>(T(-1.42860682030941723212e-6)), r);
    constexpr float c[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f};
    const VecOf<T> e = multiply_add<T>(r * r, horner<T>(r, c), r) + T(1);
    return (VecOf<T>)_mm512_maskz_scalef_ps(__mmask16(-1), (__m512)e, (__m512)n);
  }
#endif
  return exponential<T>(x);
}

// log(x) of a positive number; a NaN stays one.
template <class T>
MTMLK_INLINE VecOf<T> logarithm_or_nan(VecOf<T> x) {
  return logarithm<T>(x) + (x - x);
}

// t log t, 0 at 0, NaN below it. Below the normal numbers the product is 0 to every precision that matters.
template <class T>
MTMLK_INLINE VecOf<T> times_log(VecOf<T> t) {
  const T tiny = T(sizeof(T) == 4 ? 1.17549435e-38 : 2.2250738585072014e-308), nan = T(__builtin_nan(""));
  const VecOf<T> product = t * logarithm<T>(t >= tiny ? t : splat<T>(T(1)));
  return t >= T(0) ? (t >= tiny ? product : VecOf<T>{}) : splat<T>(nan);
}

// Stores past the caches, for gradients too large to stay there: a plain store reads the line first.
template <class T>
MTMLK_INLINE void stream(T* p, VecOf<T> v) {
#if defined(MTMLK_ISA_AVX512)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(MTMLK_ISA_AVX2)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store<T>(p, v);
#endif
}

inline void streams_done() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
MTMLK_INLINE bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % kVecBytes == 0;
}

template <class T>
MTMLK_INLINE VecOf<T> larger(VecOf<T> a, VecOf<T> b) {  // a NaN in b stays out: its exponential is found later
  return a > b ? a : b;
}

// The weight of a row; 0 where it is ignored.
template <class T>
MTMLK_INLINE T weight_of(const MtmlkHead& h, int64_t row) {
  return h.sample_weights ? static_cast<const T*>(h.sample_weights)[row / h.rows_per_weight] : T(1);
}

// A softmax head's options:  loss = A log(sum) - sum_k B_k (z_k - top),  dz_k = p_k A - B_k,  A = sum_k B_k
//   ids             B_k = hit c_y [k = y] + smooth c_k       hit = 1 - e, smooth = e / C
//   probabilities   B_k = c_k (hit t_k + smooth)             kl: hit = 1, smooth = 0, plus sum_k t_k log t_k
template <class T>
struct Softmax {
  int64_t classes;
  T hit, smooth, spread;  // spread = smooth sum_k c_k
  const T* c;             // class weights or nullptr
  bool kl;
};

template <class T>
Softmax<T> softmax_of(const MtmlkHead& h) {
  const double e = h.kind == kMultiheadCrossEntropy ? h.p0 : 0;
  Softmax<T> s = {h.classes,
                  T(1 - e),
                  T(e / double(h.classes)),
                  T(e),
                  static_cast<const T*>(h.class_weights),
                  h.kind == kMultiheadKl};
  if (s.c) {
    double sum = 0;
    for (int64_t k = 0; k < h.classes && e != 0; ++k) sum += double(s.c[k]);
    s.spread = T(e / double(h.classes) * sum);
  }
  return s;
}

}  // namespace
}  // namespace mtmlk
