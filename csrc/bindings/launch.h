// What a lane starts. A kernel of another kind is a class of its own, bound in a file of its own.
#pragma once

#include <cstddef>

#include "mtml/abi.h"

namespace mtmlk {

// A kernel with all that it needs to know beside a call's tensors.
class Launch {
 public:
  virtual ~Launch() = default;
  // tensors: what is read, then the outputs, own gradients, and the tasks' shares of sums in the dtype of the call and
  // in float64, null where there are none. A MtmlkCudaStatus.
  virtual int run(void* const* tensors, size_t count, void* workspace, void* stream, MtmlkReason* reason) const = 0;
};

}  // namespace mtmlk
