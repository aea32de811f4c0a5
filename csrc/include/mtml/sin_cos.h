// sin and cos of a float or a double at once, of any size, for a host or a CUDA device. A device's own keep an array in
// local memory for large arguments, which every kernel that calls them then has; here there is none.
//
//   x = n pi/2 + r + rest, |r| <= pi/4:  (sin x, cos x) = (sin(r + rest), cos(r + rest)) turned by n quarters
//
// Largest errors: 1.18 ulp of all floats, 1.2 ulp of sampled doubles. An infinity or NaN gives NaN. Nothing is left to a
// compiler to fuse: devices and hosts give the same bits.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "mtml/arithmetic.h"
#include "mtml/rounded.h"

namespace mtmlk {

template <class T>
struct ScalarSinCos {
  T sin, cos;
};

// `rest` is what r lost to rounding.
template <class T>
struct Quarters {
  T r, rest;
  int n;
};

// c + z (c1 + z (c2 + ...))
template <class T>
MTMLK_ANYWHERE T polynomial(T, T c) {
  return c;
}
template <class T, class... Higher>
MTMLK_ANYWHERE T polynomial(T z, T c, Higher... higher) {
  return ::fma(polynomial(z, higher...), z, c);
}

// Cody and Waite's reduction for |x| <= 1e5, by pi/2 in three parts. x - n kFirst is exact: it is no larger than 1 and has
// no finer bits than kFirst. Near a multiple of pi/2 most of that cancels against n kSecond, whose rounding is kept, too.
template <class T>
MTMLK_ANYWHERE Quarters<T> quarters_near(T x) {
  constexpr bool kF32 = sizeof(T) == 4;
  constexpr T kFirst = T(kF32 ? 0x1.921fb6p+0 : 0x1.921fb54442d18p+0);
  constexpr T kSecond = T(kF32 ? -0x1.777a5cp-25 : 0x1.1a62633145c07p-54);
  constexpr T kThird = T(kF32 ? -0x1.ee59dap-50 : -0x1.f1976b7ed8fbcp-110);
  const T n = ::rint(x * T(0.63661977236758134308));
  const T whole = ::fma(n, -kFirst, x), part = rounded_product(n, kSecond);
  const T r = whole - part, back = r - whole;
  const T lost = (whole - (r - back)) - (part + back);  // exactly whole - part - r (Knuth)
  return {r, ::fma(n, -kThird, lost - ::fma(n, kSecond, -part)), int(n)};
}

__extension__ typedef unsigned __int128 Bits128;

// The 64 bits of 2/pi that follow its first 64 (i - 1) + shift ones.
MTMLK_ANYWHERE uint64_t two_over_pi(int i, int shift) {
  static constexpr uint64_t kBits[] = {0x0000000000000000, 0xa2f9836e4e441529, 0xfc2757d1f534ddc0, 0xdb6295993c439041,
                                       0xfe5163abdebbc561, 0xb7246e3a424dd2e0, 0x06492eea09d1921c, 0xfe1deb1cb129a73e,
                                       0xe88235f52ebb4484, 0xe99c7026b45f7e41, 0x3991d639835339f4, 0x9c845f8bbdf9283b,
                                       0x1ff897ffde05980f, 0xef2f118b5a0a6d1f, 0x6d367ecf27cb09b7, 0x4f463f669e5fea2d,
                                       0x7527bac7ebe5f17b, 0x3d0739f78a5292ea, 0x6bfb5fb11f8d5d08, 0x56033046fc7b6bab};
  return uint64_t((Bits128(kBits[i]) << 64 | kBits[i + 1]) << shift >> 64);
}

// Payne and Hanek's reduction for finite |x| >= 1: |x| = m 2^e times a window of 192 bits of 2/pi. Bits before it make
// whole turns. What is cut off is less than 2^-125 of a quarter, and no double is nearer than 2^-62 to a number of them.
MTMLK_ANYWHERE Quarters<double> quarters_far(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint64_t m = (bits & ((uint64_t(1) << 52) - 1)) | uint64_t(1) << 52;
  const int e = int(bits >> 52 & 0x7ff) - 1075;
  const int start = e - 2 + 64;  // m 2^e times earlier bits is a multiple of 4; the table has 64 zeros before the point
  const int i = start / 64, shift = start % 64;
  const Bits128 turn = (Bits128(m * two_over_pi(i, shift)) << 64) + Bits128(m) * two_over_pi(i + 1, shift) +
                       (Bits128(m) * two_over_pi(i + 2, shift) >> 64);  // |x| modulo a turn, in units of 2^-128
  const Bits128 fraction = turn << 2;                                   // of a quarter
  const bool above_half = fraction >> 127 != 0;
  const Bits128 size = above_half ? -fraction : fraction;
  const int n = int(turn >> 126) + above_half;

  const uint64_t high = uint64_t(size >> 64), low = uint64_t(size), fine = 0x7ff;  // head has at most 53 bits
  const double head = double(high & ~fine), tail = ::fma(double(low), 0x1p-64, double(high & fine));
  const double unit = above_half != (x < 0) ? -0x1p-64 : 0x1p-64;
  const double q = head + tail, q_rest = tail - (q - head);
  const double first = 0x1.921fb54442d18p+0 * unit, second = 0x1.1a62633145c07p-54 * unit;
  const double r = rounded_product(q, first);
  return {r, ::fma(q, first, -r) + ::fma(q, second, q_rest * first), x < 0 ? -n : n};
}

template <class T>
MTMLK_ANYWHERE Quarters<T> quarters(T x) {
  if (::fabs(x) <= T(1e5)) return quarters_near(x);
  if (x - x != T(0)) return {x - x, T(0), 0};  // infinite or NaN: NaN
  const Quarters<double> q = quarters_far(double(x));
  const T r = T(q.r);
  return {r, T(q.r - double(r) + q.rest), q.n};
}

// By Taylor's series.
template <class T>
MTMLK_ANYWHERE ScalarSinCos<T> sin_cos_within_a_quarter(T r, T rest) {
  const T z = r * r;
  T s, c;
  if constexpr (sizeof(T) == 4) {
    s = polynomial(z, -1.f / 6, 1.f / 120, -1.f / 5040, 1.f / 362880, -1.f / 39916800);
    c = polynomial(z, -0.5f, 1.f / 24, -1.f / 720, 1.f / 40320, -1.f / 3628800);
  } else {
    s = polynomial(z, -1. / 6, 1. / 120, -1. / 5040, 1. / 362880, -1. / 39916800, 1. / 6227020800, -1. / 1307674368000,
                   1. / 355687428096000, -1. / 121645100408832000);
    c = polynomial(z, -0.5, 1. / 24, -1. / 720, 1. / 40320, -1. / 3628800, 1. / 479001600, -1. / 87178291200,
                   1. / 20922789888000, -1. / 6402373705728000, 1. / 2432902008176640000);
  }
  return {r + ::fma(r * z, s, rest), T(1) + ::fma(z, c, -(r * rest))};
}

template <class T>
MTMLK_ANYWHERE ScalarSinCos<T> scalar_sin_cos(T x) {
  const Quarters<T> q = quarters(x);
  const ScalarSinCos<T> t = sin_cos_within_a_quarter(q.r, q.rest);
  const bool swap = (q.n & 1) != 0;
  const T s = swap ? t.cos : t.sin, c = swap ? t.sin : t.cos;
  return {x == T(0) ? x : (q.n & 2) != 0 ? -s : s, ((q.n + 1) & 2) != 0 ? -c : c};  // -0 stays -0
}

}  // namespace mtmlk
