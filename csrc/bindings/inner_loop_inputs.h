// What an inner loop reads. The files that list it: this one, tensors.h and mtml_kernels/native/inner_loop.py.
#pragma once

#include "bindings/common.h"

namespace mtmlk {

struct InnerLoopInputs {
  Addresses params, support_x, query_x, lr, moments;
  Address support_y = 0, query_y = 0, support_mask = 0, query_mask = 0, step_weights = 0, hyper = 0;
};

}  // namespace mtmlk
