// Head losses cut into units: what the calls with and without linear layers share.
#pragma once

#include <stdint.h>

#include <vector>

#include "mtml/abi.h"
#include "runtime/watch.h"
#include "multihead_loss/call.h"

namespace mtmlk {

// The units of one or more heads, their norms and their losses. Heads are looked at again in `add_losses`, which may
// see a block of the rows that `prepare` saw.
class MultiheadUnits {
 public:
  MultiheadUnits(const MtmlkHead* heads, int64_t n, int32_t dtype, int threads, Watch* watch);

  int prepare(MtmlkHeadError* error);  // checks labels, sums norms
  int add_losses(const MtmlkHead* heads);
  void put_losses(void* losses) const;

 private:
  MultiheadCall call(const MtmlkHead* heads, std::vector<MultiheadUnit>& units) const;

  const MtmlkHead* heads_;
  int64_t n_;
  int32_t dtype_;
  int threads_;
  Watch* watch_;
  std::vector<double> inverse_, sums_;
};

}  // namespace mtmlk
