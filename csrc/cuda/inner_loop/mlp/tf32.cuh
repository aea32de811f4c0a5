// Products on matrix units: numbers of float32 as one or two of TF32, whose products are added up in float32.
//
//   x = high + low + rest     high: x rounded to 11 bits; low: what is left, rounded likewise
//   one term      a b = ah bh                      a product's error is about 2^-11 of it
//   three terms   a b = al bh + ah bl + ah bh      about 2^-22
//
// Matrix units cut off what an accumulator has no room for. Of one term that is nothing beside the products' errors; sums
// of three terms leave the unit after eight products and are added up outside of it, where numbers are rounded.
#pragma once

#include <string.h>

#include "cuda/device_api.h"

namespace mtmlk {

DEV uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// x to 11 bits, halves to even: two instructions, where to_tf32() takes four. Beyond 4e34 it is no number.
DEV float rounded_to_tf32(float x) { return rounded_product(x, 8193.0f) - 8192.0f * x; }

// What a lane holds of a matrix.
template <int kCount, int kTerms>
struct Tf32 {
  static_assert(kTerms == 1 || kTerms == 3, "one product for one of float32, or three");
  uint32_t high[kCount], low[kTerms == 3 ? kCount : 1];

  DEV void set(int i, float x) {
    const float near = rounded_to_tf32(x);
    high[i] = bits_of(near);
    // The unit reads 11 bits and cuts off the others: with half of the last one added it rounds, at the price of one
    // instruction. A number that is none, which this may turn into one, is in `high`.
    if constexpr (kTerms == 3) low[i] = bits_of(x - near) + 0x1000u;
  }
};

// sum[16, 8] += A[16, 8] B[8, 8] of a warp, laid out as in mma_tf32_16x8x8().
template <int kTerms>
DEV void add_product(float (&sum)[4], const Tf32<4, kTerms>& a, const Tf32<2, kTerms>& b) {
  if constexpr (kTerms == 1) {
    mma_tf32_16x8x8(sum, a.high, b.high);
  } else {
    float of_eight[4] = {};
    mma_tf32_16x8x8(of_eight, a.low, b.high);
    mma_tf32_16x8x8(of_eight, a.high, b.low);
    mma_tf32_16x8x8(of_eight, a.high, b.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += of_eight[i];
  }
}

}  // namespace mtmlk
