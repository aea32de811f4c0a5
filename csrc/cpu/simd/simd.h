// Vectors of one instruction set, as compiler vector types.; needs <stdint.h>.
//
// Every internal row is padded to whole vectors and aligned, so no loop below has a scalar tail.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <stdint.h>

namespace mtmlk {
namespace {

#if defined(MTMLK_ISA_AVX512)
constexpr int kVecBytes = 64;
constexpr int kPanelVecs = 4;  // accumulators of one tile: kPanelVecs x tile_rows(kPanelVecs) of 32 registers
#elif defined(MTMLK_ISA_AVX2)
constexpr int kVecBytes = 32;
constexpr int kPanelVecs = 2;
#else
constexpr int kVecBytes = 16;
constexpr int kPanelVecs = 2;
#endif

typedef float F32Vec __attribute__((vector_size(kVecBytes)));
typedef double F64Vec __attribute__((vector_size(kVecBytes)));
typedef int32_t I32Vec __attribute__((vector_size(kVecBytes)));
typedef int64_t I64Vec __attribute__((vector_size(kVecBytes)));
typedef uint32_t U32Vec __attribute__((vector_size(kVecBytes)));
typedef uint64_t U64Vec __attribute__((vector_size(kVecBytes)));

template <class T>
struct Simd;

template <>
struct Simd<float> {
  using Vec = F32Vec;
  using Int = I32Vec;
  using Unsigned = U32Vec;
  using Lane = int32_t;
  static constexpr int kLanes = kVecBytes / 4;
  static constexpr int kMantissa = 23, kBias = 127;
};

template <>
struct Simd<double> {
  using Vec = F64Vec;
  using Int = I64Vec;
  using Unsigned = U64Vec;
  using Lane = int64_t;
  static constexpr int kLanes = kVecBytes / 8;
  static constexpr int kMantissa = 52, kBias = 1023;
};

#define MTMLK_INLINE inline __attribute__((always_inline))

template <class T>
using VecOf = typename Simd<T>::Vec;
template <class T>
using IntOf = typename Simd<T>::Int;

// x - 0 is x for every x, -0 and NaN too, so this is one broadcast.
template <class T>
MTMLK_INLINE VecOf<T> splat(T x) {
  return x - VecOf<T>{};
}

template <class T>
MTMLK_INLINE VecOf<T> load(const T* p) {
  return *reinterpret_cast<const VecOf<T>*>(p);
}

template <class T>
MTMLK_INLINE void store(T* p, VecOf<T> v) {
  *reinterpret_cast<VecOf<T>*>(p) = v;
}

// a b + c. Files are compiled with -ffp-contract=off and this is the only fused operation: left to the compiler,
// whether a sum is fused would depend on the code around it, and two paths to one result could differ in their last
// bits.
template <class T>
MTMLK_INLINE VecOf<T> multiply_add(VecOf<T> a, VecOf<T> b, VecOf<T> c) {
#if defined(MTMLK_ISA_AVX512)
  if constexpr (sizeof(T) == 4)
    return (VecOf<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else
    return (VecOf<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(MTMLK_ISA_AVX2)
  if constexpr (sizeof(T) == 4)
    return (VecOf<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else
    return (VecOf<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// 0, 1, 2, ... as T.
template <class T>
MTMLK_INLINE VecOf<T> iota() {
  VecOf<T> v;
  for (int i = 0; i < Simd<T>::kLanes; ++i) v[i] = T(i);
  return v;
}

// The same at any address.
template <class T>
MTMLK_INLINE VecOf<T> load_anywhere(const T* p) {
  VecOf<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
MTMLK_INLINE void store_anywhere(T* p, VecOf<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// The first n < kLanes elements at p, zeros behind them; reads nothing beyond.
template <class T>
MTMLK_INLINE VecOf<T> load_first(const T* p, int64_t n) {
#if defined(MTMLK_ISA_AVX512)
  if constexpr (sizeof(T) == 4)
    return (VecOf<T>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  else
    return (VecOf<T>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#else
  VecOf<T> v = {};
  for (int i = 0; i < Simd<T>::kLanes; ++i)
    if (i < n) v[i] = p[i];
  return v;
#endif
}

// Whole vectors where they are, zeros behind the end. The address may be unaligned.
template <class T>
MTMLK_INLINE VecOf<T> load_some(const T* p, int64_t n) {
  return n < Simd<T>::kLanes ? load_first<T>(p, n) : load_anywhere<T>(p);
}

template <class T>
MTMLK_INLINE VecOf<T> keep_lanes(VecOf<T> v, int64_t n) {
  return n >= Simd<T>::kLanes ? v : (iota<T>() < T(n) ? v : VecOf<T>{});
}

// x and y, one lane of each in turn: of their lower halves, and of their upper ones.
template <class T>
MTMLK_INLINE void interleave(VecOf<T> x, VecOf<T> y, VecOf<T>& low, VecOf<T>& high) {
  constexpr int kLanes = Simd<T>::kLanes, kHalf = kLanes / 2;
#if defined(__clang__)
  for (int i = 0; i < kHalf; ++i) {
    low[2 * i] = x[i], low[2 * i + 1] = y[i];
    high[2 * i] = x[kHalf + i], high[2 * i + 1] = y[kHalf + i];
  }
#else
  IntOf<T> first, second;
  for (int i = 0; i < kHalf; ++i) {
    first[2 * i] = i, first[2 * i + 1] = kLanes + i;
    second[2 * i] = kHalf + i, second[2 * i + 1] = kLanes + kHalf + i;
  }
  low = __builtin_shuffle(x, y, first);
  high = __builtin_shuffle(x, y, second);
#endif
}

// Lane i of the result is the sum of v[i]'s lanes: 3 operations a sum, where one at a time takes 8.
template <class T>
MTMLK_INLINE VecOf<T> sum_each(VecOf<T> (&v)[Simd<T>::kLanes]) {
  for (int half = Simd<T>::kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) {
      VecOf<T> low, high;
      interleave<T>(v[i], v[i + half], low, high);
      v[i] = low + high;
    }
  return v[0];
}

template <class T>
MTMLK_INLINE T sum_lanes(VecOf<T> v) {
  T tmp[Simd<T>::kLanes] __attribute__((aligned(kVecBytes)));
  store<T>(tmp, v);
  for (int width = Simd<T>::kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) tmp[i] += tmp[i + width];
  return tmp[0];
}

// NaN wins, so that a NaN logit is not lost.
template <class T>
MTMLK_INLINE T max_lanes(VecOf<T> v) {
  T best = v[0];
  for (int i = 1; i < Simd<T>::kLanes; ++i) best = (v[i] > best || v[i] != v[i]) ? v[i] : best;
  return best;
}

// The first n <= kLanes elements of v.
template <class T>
MTMLK_INLINE void store_some(T* p, VecOf<T> v, int64_t n) {
  if (n >= Simd<T>::kLanes) return store_anywhere<T>(p, v);
#if defined(MTMLK_ISA_AVX512)
  if constexpr (sizeof(T) == 4)
    return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  else
    return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
#endif
  for (int i = 0; i < int(n); ++i) p[i] = v[i];
}

}  // namespace
}  // namespace mtmlk
