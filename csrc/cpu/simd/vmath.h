// Elementary functions on vectors, 1-3 ulp.
// Polynomials in Horner form; Taylor where the reduced argument is small, Chebyshev fits for erf (errors noted).
#pragma once

#include <stdint.h>

#include "simd/simd.h"

namespace mtmlk {
namespace {

template <class T, int N>
MTMLK_INLINE VecOf<T> horner(VecOf<T> x, const T (&c)[N]) {  // highest power first
  VecOf<T> y = splat<T>(c[0]);
  for (int i = 1; i < N; ++i) y = multiply_add<T>(y, x, splat<T>(c[i]));
  return y;
}

template <class T>
MTMLK_INLINE IntOf<T> bits(VecOf<T> x) {
  return (IntOf<T>)x;  // the same bits
}

template <class T>
MTMLK_INLINE VecOf<T> from_bits(IntOf<T> x) {
  return (VecOf<T>)x;
}

template <class T>
MTMLK_INLINE VecOf<T> absolute(VecOf<T> x) {
  return from_bits<T>(bits<T>(x) & ~(IntOf<T>{} + (typename Simd<T>::Lane(1) << (sizeof(T) * 8 - 1))));
}

// min and max that let a NaN in x through.
template <class T>
MTMLK_INLINE VecOf<T> at_most(VecOf<T> x, T hi) {
  return x > hi ? splat<T>(hi) : x;
}
template <class T>
MTMLK_INLINE VecOf<T> at_least(VecOf<T> x, T lo) {
  return x < lo ? splat<T>(lo) : x;
}

// Adding 1.5 * 2^mantissa rounds to an integer, which then stands in the low bits. Of a NaN, or beyond all integers, it
// is any number: differences of unsigned ones wrap.
template <class T>
struct Rounded {
  VecOf<T> value;
  IntOf<T> integer;
};
template <class T>
MTMLK_INLINE Rounded<T> round_to_int(VecOf<T> x) {
  const T magic = T(1.5) * T(int64_t(1) << Simd<T>::kMantissa);
  const VecOf<T> shifted = x + magic;
  using Bits = typename Simd<T>::Unsigned;
  return {shifted - magic, (IntOf<T>)((Bits)shifted - (Bits)splat<T>(magic))};
}

template <class T>
MTMLK_INLINE VecOf<T> power_of_two(IntOf<T> n) {  // normal numbers only
  return from_bits<T>((n + Simd<T>::kBias) << Simd<T>::kMantissa);
}

// e^r - 1 for |r| <= ln 2 / 2, and the n of x = n ln 2 + r.
template <class T>
struct Reduced {
  VecOf<T> expm1;
  IntOf<T> n;
};

template <class T>
MTMLK_INLINE Reduced<T> reduce_exp(VecOf<T> x) {
  constexpr bool kF32 = sizeof(T) == 4;
  const Rounded<T> n = round_to_int<T>(x * T(1.4426950408889634074));
  VecOf<T> r = multiply_add<T>(n.value, splat<T>(T(kF32 ? -0.693145751953125 : -0.6931471803691238164902)), x);
  r = multiply_add<T>(n.value, splat<T>(T(kF32 ? -1.42860682030941723212e-6 : -1.9082149292705877000e-10)), r);
  if constexpr (kF32) {
    constexpr float c[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f};
    return {multiply_add<T>(r * r, horner<T>(r, c), r), n.integer};
  } else {
    constexpr double c[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320,
                            1. / 5040,       1. / 720,       1. / 120,      1. / 24,      1. / 6,      0.5};
    return {multiply_add<T>(r * r, horner<T>(r, c), r), n.integer};
  }
}

template <class T>
MTMLK_INLINE VecOf<T> exponential(VecOf<T> x) {
  constexpr bool kF32 = sizeof(T) == 4;
  const VecOf<T> clamped = at_least<T>(at_most<T>(x, T(kF32 ? 89 : 710)), T(kF32 ? -105 : -750));
  const Reduced<T> r = reduce_exp<T>(clamped);
  const IntOf<T> half = r.n >> 1;  // two factors: the result may be subnormal or need 2^128
  return (r.expm1 + T(1)) * power_of_two<T>(half) * power_of_two<T>(r.n - half);
}

// e^x - 1 with full relative accuracy near 0; |x| <= 60.
template <class T>
MTMLK_INLINE VecOf<T> exponential_m1(VecOf<T> x) {
  const Reduced<T> r = reduce_exp<T>(x);
  const VecOf<T> scale = power_of_two<T>(r.n);
  return multiply_add<T>(r.expm1, scale, scale - T(1));
}

template <class T>
MTMLK_INLINE VecOf<T> logarithm(VecOf<T> x) {  // positive, normal
  constexpr int kMantissa = Simd<T>::kMantissa;
  // Mantissa in [sqrt(1/2), sqrt(2)).
  const IntOf<T> offset = bits<T>(x) - bits<T>(splat<T>(T(0.70710678118654752440)));
  const IntOf<T> n = offset >> kMantissa;
  const VecOf<T> m = from_bits<T>(bits<T>(x) - (n << kMantissa));
  const VecOf<T> f = m - T(1);
  const VecOf<T> s = f / (f + T(2));
  const VecOf<T> z = s * s;
  VecOf<T> tail;
  if constexpr (sizeof(T) == 4) {
    constexpr float c[] = {2.f / 11, 2.f / 9, 2.f / 7, 2.f / 5, 2.f / 3};
    tail = horner<T>(z, c);
  } else {
    constexpr double c[] = {2. / 23, 2. / 21, 2. / 19, 2. / 17, 2. / 15, 2. / 13,
                            2. / 11, 2. / 9,  2. / 7,  2. / 5,  2. / 3};
    tail = horner<T>(z, c);
  }
  const VecOf<T> number = __builtin_convertvector(n, VecOf<T>);
  const VecOf<T> log_m = multiply_add<T>(s * z, tail, s + s);
  return multiply_add<T>(number, splat<T>(T(0.69314718055994530942)), log_m);
}

template <class T>
MTMLK_INLINE VecOf<T> logarithm_1p(VecOf<T> u) {  // u in [0, 1]
  const VecOf<T> w = u + T(1);
  return logarithm<T>(w) + (u - (w - T(1))) / w;
}

template <class T>
MTMLK_INLINE VecOf<T> hyperbolic_tangent(VecOf<T> x) {
  const VecOf<T> e = exponential_m1<T>(at_least<T>(at_most<T>(x + x, T(45)), T(-45)));
  return e / (e + T(2));
}

template <class T>
MTMLK_INLINE VecOf<T> logistic(VecOf<T> x) {
  return T(1) / (exponential<T>(-x) + T(1));
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)
template <class T>
MTMLK_INLINE VecOf<T> log1p_exp(VecOf<T> x) {
  return at_least<T>(x, T(0)) + logarithm_1p<T>(exponential<T>(-absolute<T>(x)));
}

template <class T>
MTMLK_INLINE VecOf<T> error_function(VecOf<T> x) {
  const VecOf<T> z = absolute<T>(x);
  const VecOf<T> z2 = z * z;
  const VecOf<T> big = at_most<T>(at_least<T>(z, T(1)), T(sizeof(T) == 4 ? 4.2 : 6));
  const VecOf<T> t = T(1) / (big + T(2));
  VecOf<T> near, far;
  if constexpr (sizeof(T) == 4) {  // errors 1.2e-9 and 1.3e-12
    constexpr float p[] = {7.8758750626854883e-5f,  -8.0168642871658695e-4f, 5.1890874234339740e-3f,
                           -2.6854212010626412e-2f, 1.1283594715160218e-1f,  -3.7612626766720331e-1f,
                           1.1283791658483510f};
    constexpr float q[] = {-44.189873435729202f, 102.74706556889706f,   -89.983135039933370f, 32.189629116172265f,
                           -5.5009645737003034f, 4.2061079679342814f,   1.8170042506919446f,  1.1399836921675380f,
                           0.56368996657439587f, 9.5526821700788276e-6f};
    near = horner<T>(z2, p);
    far = horner<T>(t, q);
  } else {  // errors 1.3e-19 and 3.0e-21
    constexpr double p[] = {5.9571761477489114044e-11, -1.137284885679167367e-9,  1.4659775274047435814e-8,
                            -1.6350312701054695011e-7, 1.6461000484121368033e-6,  -1.4925595266831181565e-5,
                            1.2055331111642710923e-4,  -8.5483269808337899052e-4, 5.2239776248180144673e-3,
                            -2.6866170645076793248e-2, 1.1283791670954878666e-1,  -3.7612638903183748056e-1,
                            1.1283791670955125738};
    constexpr double q[] = {
        -52027.887093771921985, 235916.99267970822383,  -496139.55604530911172, 638695.02679691064396,
        -559088.76836580718671, 349713.82889041085334,  -160433.68890773208853, 55162.307867491059784,
        -14769.064477599475855, 3233.6644453479983135,  -546.64293891159214366, 60.992697481072981481,
        -15.420842517622063032, 0.41895275329138949241, 2.6335303055924578649,  2.8232233399918990769,
        1.9745857929592963014,  1.1283808000472148938,  0.56418956860416015691, -3.448675019537970737e-11};
    near = horner<T>(z2, p);
    far = horner<T>(t, q);
  }
  const VecOf<T> tail = T(1) - exponential<T>(-(big * big)) * far;
  const VecOf<T> sign_tail = x < T(0) ? -tail : tail;
  const VecOf<T> value = z > T(1) ? sign_tail : x * near;
  return x != x ? x : value;
}

template <class T>
struct SinCos {
  VecOf<T> sin, cos;
};

// Cody-Waite reduction by pi/2 in three parts; good to `limit`. Beyond, lane by lane.
template <class T>
MTMLK_INLINE SinCos<T> sin_cos(VecOf<T> x) {
  constexpr bool kF32 = sizeof(T) == 4;
  const Rounded<T> n = round_to_int<T>(x * T(0.63661977236758134308));
  VecOf<T> r = multiply_add<T>(n.value, splat<T>(T(kF32 ? -1.5703125 : -1.57079632673412561417)), x);
  r = multiply_add<T>(n.value, splat<T>(T(kF32 ? -4.83751296997070312500e-4 : -6.07710050630396597660e-11)), r);
  r = multiply_add<T>(n.value, splat<T>(T(kF32 ? -7.54978995489188e-8 : -2.02226624879595063154e-21)), r);
  const VecOf<T> z = r * r;
  VecOf<T> s, c;
  if constexpr (kF32) {
    constexpr float ps[] = {-1.f / 39916800, 1.f / 362880, -1.f / 5040, 1.f / 120, -1.f / 6};
    constexpr float pc[] = {-1.f / 3628800, 1.f / 40320, -1.f / 720, 1.f / 24, -0.5f};
    s = multiply_add<T>(r * z, horner<T>(z, ps), r);
    c = multiply_add<T>(z, horner<T>(z, pc), splat<T>(T(1)));
  } else {
    constexpr double ps[] = {-1. / 121645100408832000,
                             1. / 355687428096000,
                             -1. / 1307674368000,
                             1. / 6227020800,
                             -1. / 39916800,
                             1. / 362880,
                             -1. / 5040,
                             1. / 120,
                             -1. / 6};
    constexpr double pc[] = {1. / 2432902008176640000,
                             -1. / 6402373705728000,
                             1. / 20922789888000,
                             -1. / 87178291200,
                             1. / 479001600,
                             -1. / 3628800,
                             1. / 40320,
                             -1. / 720,
                             1. / 24,
                             -0.5};
    s = multiply_add<T>(r * z, horner<T>(z, ps), r);
    c = multiply_add<T>(z, horner<T>(z, pc), splat<T>(T(1)));
  }
  const IntOf<T> q = n.integer;
  const IntOf<T> swap = (q & 1) != 0;
  VecOf<T> sine = swap ? c : s, cosine = swap ? s : c;
  sine = (q & 2) != 0 ? -sine : sine;
  cosine = ((q + 1) & 2) != 0 ? -cosine : cosine;
#if defined(__FMA__)
  const T limit = T(1e5);
#else
  const T limit = T(kF32 ? 1.2e4 : 1e5);  // n times the second part has to be exact: n < 2^13
#endif
  const IntOf<T> far = absolute<T>(x) > limit;
  bool any = false;
  for (int i = 0; i < Simd<T>::kLanes; ++i) any |= far[i] != 0;
  if (__builtin_expect(any, 0))
    for (int i = 0; i < Simd<T>::kLanes; ++i)
      if (far[i]) {
        sine[i] = T(kF32 ? __builtin_sinf(float(x[i])) : __builtin_sin(double(x[i])));
        cosine[i] = T(kF32 ? __builtin_cosf(float(x[i])) : __builtin_cos(double(x[i])));
      }
  return {sine, cosine};
}

template <class T>
MTMLK_INLINE VecOf<T> square_root(VecOf<T> x) {
#if defined(MTMLK_ISA_AVX512)  // the forms without a mask read what was never written, which compilers warn of
  if constexpr (sizeof(T) == 4)
    return VecOf<T>(_mm512_maskz_sqrt_ps(__mmask16(-1), __m512(x)));
  else
    return VecOf<T>(_mm512_maskz_sqrt_pd(__mmask8(-1), __m512d(x)));
#elif defined(MTMLK_ISA_AVX2)
  if constexpr (sizeof(T) == 4)
    return VecOf<T>(_mm256_sqrt_ps(__m256(x)));
  else
    return VecOf<T>(_mm256_sqrt_pd(__m256d(x)));
#else
  for (int i = 0; i < Simd<T>::kLanes; ++i) x[i] = T(__builtin_sqrt(double(x[i])));
  return x;
#endif
}

// The arithmetic of vectors, for the formulas of include/mtml.
template <class T>
struct VectorMath {
  using Scalar = T;
  using Value = VecOf<T>;

  static MTMLK_INLINE Value exp(Value x) { return exponential<T>(x); }
  static MTMLK_INLINE Value tanh(Value x) { return hyperbolic_tangent<T>(x); }
  static MTMLK_INLINE Value logistic(Value x) { return mtmlk::logistic<T>(x); }
  static MTMLK_INLINE Value erf(Value x) { return error_function<T>(x); }
  static MTMLK_INLINE Value log1p_exp(Value x) { return mtmlk::log1p_exp<T>(x); }
  static MTMLK_INLINE SinCos<T> sin_cos(Value x) { return mtmlk::sin_cos<T>(x); }
  static MTMLK_INLINE Value abs(Value x) { return absolute<T>(x); }
  static MTMLK_INLINE Value sqrt(Value x) { return square_root<T>(x); }
  static MTMLK_INLINE Value rsqrt(Value x) {
    for (int i = 0; i < Simd<T>::kLanes; ++i) x[i] = T(1) / T(__builtin_sqrt(double(x[i])));
    return x;
  }
};

}  // namespace
}  // namespace mtmlk
