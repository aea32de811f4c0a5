// Products of fragments that a warp holds, as PTX lays them out (mma.m16n8k8).
#pragma once

#include <stdint.h>
#include <string.h>

#include <cmath>

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

// What a lane holds of A and B (device_api.h), as the registers that others see: A's four, then B's two.
struct Fragments {
  uint32_t words[6];
};

// What the matrix unit reads of a register.
inline double tf32_value(uint32_t bits) {
  bits &= 0xffffe000u;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// A[row, 8] and B[8, column], by way of the lanes that hold them.
inline void gather_row(const Exchange& lanes, int row, double (&a)[8]) {
  for (int k = 0; k < 8; ++k) a[k] = tf32_value(lanes.of<uint32_t>(row % 8 * 4 + k % 4, row / 8 + k / 4 * 2));
}
inline void gather_column(const Exchange& lanes, int column, double (&b)[8]) {
  for (int k = 0; k < 8; ++k) b[k] = tf32_value(lanes.of<uint32_t>(column * 4 + k % 4, 4 + k / 4));
}

// Hardware adds in an order of its own, and cuts off what the accumulator has no room for (Fasi, Higham, Mikaitis,
// Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021).
inline float sum_of(float first, const double (&a)[8], const double (&b)[8]) {
  double sum = first;
  for (int k = 0; k < 8; ++k) sum += a[k] * b[k];
  const float rounded = float(sum);
  return std::abs(double(rounded)) > std::abs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}

}  // namespace host

// D[16, 8] += A[16, 8] B[8, 8]
inline void mma_tf32_16x8x8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            host::Place place = host::here()) {
  host::tsan::Quiet quiet;
  host::Exchange lanes(0xffffffffu, place);
  lanes.show(host::Fragments{{a[0], a[1], a[2], a[3], b[0], b[1]}});
  const int group = host::self().lane / 4, within = host::self().lane % 4;
  double rows[2][8], columns[2][8];
  for (int i = 0; i < 2; ++i) {
    host::gather_row(lanes, group + 8 * i, rows[i]);
    host::gather_column(lanes, 2 * within + i, columns[i]);
  }
  for (int i = 0; i < 4; ++i) d[i] = host::sum_of(d[i], rows[i / 2], columns[i % 2]);
}

}  // namespace mtmlk
