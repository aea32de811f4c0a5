// What a call of the head losses hands to the kernels.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "runtime/watch.h"

namespace mtmlk {

// A part of one head's rows, or (elementwise kinds) of its rows' elements: cut by the head's own shape only.
struct MultiheadUnit {
  int64_t head, row0, row1, col0, col1;
  double norm, loss;  // sums over the unit: of what the rows count, and of their losses
  int64_t bad;        // the first row with a label out of range, or -1
};

// 1 / norm of a head. +0 says that nothing in it counts; an infinite norm, by which weights are 0 or NaN, gives -0.
static inline double inverse_norm(double norm) {
  return norm == 0 ? 0.0 : norm - norm == 0 || norm != norm ? 1 / norm : -0.0;
}

static inline bool counts_nothing(double inverse) { return inverse == 0 && !__builtin_signbit(inverse); }

struct MultiheadCall {
  const MtmlkHead* heads;
  MultiheadUnit* units;
  int64_t n_units;
  const double* inverse;  // [heads] 1 / norm; see counts_nothing
  int threads;
  Watch* watch;
};

}  // namespace mtmlk
