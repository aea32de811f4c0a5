// Products of fragments that a warp holds, as PTX lays them out (mma.m16n8k8).
#pragma once

#include <stdint.h>
#include <string.h>

#include "cuda/host/exchange.h"

namespace mtmlk {

// To TF32's 10 bits of fraction, halves away from zero.
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0x1000u;
  return bits & 0xffffe000u;
}

namespace host {

// Of one lane, by group = lane / 4 and within = lane % 4: A[group + 8 (i % 2), within + 4 (i / 2)] and
// B[within + 4 i, group].
struct Fragments {
  uint32_t a[4], b[2];
};

// What the matrix unit reads of a register.
inline float tf32_value(uint32_t bits) {
  bits &= 0xffffe000u;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// sum_k A[row, k] B[k, col]; the order in which hardware adds is its own.
inline float mma_element(const Exchange& lanes, int row, int col) {
  double sum = 0;
  for (int k = 0; k < 8; ++k) {
    const auto left = lanes.of<Fragments>(row % 8 * 4 + k % 4), right = lanes.of<Fragments>(col * 4 + k % 4);
    sum += double(tf32_value(left.a[row / 8 + k / 4 * 2])) * tf32_value(right.b[k / 4]);
  }
  return float(sum);
}

}  // namespace host

// D[16, 8] += A[16, 8] B[8, 8]
inline void mma_tf32_16x8x8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            host::Place place = host::here()) {
  const host::Fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  host::tsan::Quiet quiet;
  host::Exchange lanes(0xffffffffu, place);
  lanes.show(mine);
  const int lane = host::self().lane;
  for (int i = 0; i < 4; ++i) d[i] += host::mma_element(lanes, lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
}

}  // namespace mtmlk
