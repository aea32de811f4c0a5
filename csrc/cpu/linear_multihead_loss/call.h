// What a call of linear heads hands to the kernels.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "runtime/watch.h"

namespace mtmlk {

// Rows [row0, row0 + rows) of linear heads; z [rows, ld] are their logits, and then the gradients at them.
struct LinearMultiheadCall {
  const MtmlkLinear* linear;
  const int64_t* starts;  // [n_heads + 1] the heads' first columns in z
  int64_t ld, row0, rows;
  void* z;
  const double* by;  // [n_heads] cotangents
  void* dx;
  void *const *dw, *const *db;
  bool add;  // to what dw and db hold
  int threads;
  Watch* watch;
  void *shared, *scratch;
  int64_t thread_bytes;
};

}  // namespace mtmlk
