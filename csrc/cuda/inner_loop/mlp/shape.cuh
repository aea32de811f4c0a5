// Where the numbers of a multi-layer perceptron lie on the chip.
//
//   z_l = a_{l-1} W_l^T + b_l,   a_l = f(z_l) for l < L,   a_0 = x;   widths n_0 .. n_L
//
// Matrices lie row by row, W_l as [O, I] like PyTorch's.
#pragma once

#include <stdint.h>

#include <utility>

#include "cuda/device_api.h"
#include "mtml/arithmetic.h"

namespace mtmlk {

// From one row to the next: an odd number of vectors of four, so that eight neighbouring rows, which are read at once,
// lie in different banks. Rows that are shorter than a vector follow each other.
MTMLK_ANYWHERE constexpr int row_of(int n) { return n < 4 ? n : 4 * (((n + 3) / 4) | 1); }
MTMLK_ANYWHERE constexpr int whole_vectors(int n) { return (n + 3) / 4 * 4; }
MTMLK_ANYWHERE constexpr int least(int a, int b) { return a < b ? a : b; }

// kBent: whether f'' is not 0, so that the way back needs what relu and its like do not.
template <bool kBent_, int... kWidths>
struct MlpShape {
  using Plain = MlpShape;
  static constexpr int kTerms = 0;  // products by multiply-adds
  static constexpr int kLayers = int(sizeof...(kWidths)) - 1;
  static constexpr bool kBent = kBent_;
  static_assert(kLayers >= 1, "no layer");

  MTMLK_ANYWHERE static constexpr int width(int l) {
    int i = 0, found = 0;  // no array: a device would look it up in memory
    ((found = i++ == l ? kWidths : found), ...);
    return found;
  }
  // Of a set of parameters.
  MTMLK_ANYWHERE static constexpr int weight(int l) { return among<&MlpShape::find_weight>(l, Ends{}); }
  MTMLK_ANYWHERE static constexpr int bias(int l) { return among<&MlpShape::find_bias>(l, Ends{}); }
  MTMLK_ANYWHERE static constexpr int layer(int l) {
    return whole_vectors(width(l) * row_of(width(l - 1))) + whole_vectors(width(l));
  }
  static constexpr int kParams = weight(kLayers + 1);
  // The same without gaps, as the caller has them.
  MTMLK_ANYWHERE static constexpr int plain_weight(int l) { return among<&MlpShape::find_plain_weight>(l, Ends{}); }
  static constexpr int kPlainParams = plain_weight(kLayers + 1);

  // Of the values of a set of samples, in rows of samples: of each layer z, its cotangent dz, and below the last one
  // a = f(z); where f bends, also the cotangent da. Of the others z is not kept below the last layer.
  enum Plane { kZ, kDz, kA, kDa };
  MTMLK_ANYWHERE static constexpr bool has(Plane p, int l) {
    return p == kDz || (p == kZ ? kBent || l == kLayers : l < kLayers && (p == kA || kBent));
  }
  // Where a plane begins, per sample. Those of rows of whole vectors come first: so they all begin with one.
  MTMLK_ANYWHERE static constexpr int plane(Plane p, int l) {
    return among<&MlpShape::find_plane>(p * (kLayers + 2) + l, Planes{});
  }
  static constexpr int kPerSample = plane(kA, kLayers + 1);  // of none: behind all

  // Numbers of a sample whose sum is <dz_l, a_{l-1} lambda_l^T>: one of each lane that has a part of it.
  MTMLK_ANYWHERE static constexpr int dots_of(int l) { return width(l) < 8 ? width(l) : width(l - 1) < 4 ? 16 : 32; }
  MTMLK_ANYWHERE static constexpr int dots(int l) { return among<&MlpShape::find_dots>(l, Ends{}); }
  static constexpr int kDots = dots(kLayers + 1);

  // Elements of such a set's planes, and of a step: its parameters and the set's.
  MTMLK_ANYWHERE static constexpr int values(int samples) { return whole_vectors(kPerSample * samples); }
  MTMLK_ANYWHERE static constexpr int step(int samples) { return kParams + values(samples); }

 private:
  // In a kernel these loops would be the optimizer's to unroll, at every use, which takes it longer than all the rest.
  // So their results are constants, of which among() takes one.
  MTMLK_ANYWHERE static constexpr int find_weight(int l) {
    int at = 0;
    for (int i = 1; i < l; ++i) at += layer(i);
    return at;
  }
  MTMLK_ANYWHERE static constexpr int find_bias(int l) {
    return l < 1 ? 0 : find_weight(l) + whole_vectors(width(l) * row_of(width(l - 1)));
  }
  MTMLK_ANYWHERE static constexpr int find_plain_weight(int l) {
    int at = 0;
    for (int i = 1; i < l; ++i) at += width(i) * (width(i - 1) + 1);
    return at;
  }
  MTMLK_ANYWHERE static constexpr int find_dots(int l) {
    int at = 0;
    for (int i = 1; i < l; ++i) at += dots_of(i);
    return at;
  }
  MTMLK_ANYWHERE static constexpr int find_plane(int number) {
    const Plane p = Plane(number / (kLayers + 2));
    const int l = number % (kLayers + 2);
    int at = 0;
    for (bool narrow : {false, true})
      for (int i = 1; i <= kLayers; ++i)
        for (Plane q : {kZ, kDz, kA, kDa}) {
          if ((width(i) < 4) != narrow) continue;
          if (i == l && q == p) return at;
          if (has(q, i)) at += row_of(width(i));
        }
    return at;
  }
  template <int (*kFind)(int), int... i>
  MTMLK_ANYWHERE static constexpr int among(int at, std::integer_sequence<int, i...>) {
    int found = 0;
    ((found = i == at ? std::integral_constant<int, kFind(i)>::value : found), ...);
    return found;
  }
  using Ends = std::make_integer_sequence<int, kLayers + 2>;
  using Planes = std::make_integer_sequence<int, 4 * (kLayers + 2)>;
};

// The same whose large products are made on matrix units, by one or three terms of TF32 (tf32.cuh).
template <class Shape, int kTerms_>
struct InTf32 : Shape {
  static constexpr int kTerms = kTerms_;
};

}  // namespace mtmlk
