// What the lanes of a warp share: the meetings of its masks, and the values that they exchange there.
#pragma once

#include <stdint.h>

#include "cuda/host/barrier.h"

namespace mtmlk {
namespace host {

constexpr int kLanes = 32;

struct Warp {
  static constexpr int kValue = 32;  // bytes that a lane can show to others

  uint32_t alive = 0;
  int used = 0;                                              // of `meetings`, those that ever were
  Meeting meetings[kLanes];                                  // as many as can be open: each lane stands in one at most
  alignas(16) unsigned char values[kLanes][kLanes][kValue];  // [meeting, lane]

  // The meeting of these lanes that waits for more of them, else a free one.
  int find(uint32_t mask) {
    int free = used;
    for (int i = used - 1; i >= 0; --i) {
      const Meeting& m = meetings[i];
      if (m.arrived > 0 && m.mask == mask) return i;
      if (m.arrived == 0 && m.leaving == 0) free = i;
    }
    if (free == used) ++used;
    meetings[free].mask = mask, meetings[free].lanes = __builtin_popcount(mask);
    return free;
  }
};

}  // namespace host
}  // namespace mtmlk
