// What a call of convolutions hands to the kernels.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "inner_loop/plan/taps.h"

namespace mtmlk {

// The products of one group of channels, channels last.
struct TaskConvCall {
  const MtmlkTaskConv2d* conv;
  const TapPlan *forward, *backward;
};

}  // namespace mtmlk
