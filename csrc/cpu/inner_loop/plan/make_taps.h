// Makes the tap plans of taps.h.
#pragma once

#include <vector>

#include "inner_loop/plan/taps.h"

namespace mtmlk {

struct TapStorage {
  std::vector<TapRun> runs;
  std::vector<TapPart> parts;
  std::vector<TapRect> rects;
  TapPlan plan;
};

struct AxisShape {
  int64_t in, out, kernel, stride, pad, dilation;
};

// `ld`: elements from one source pixel to the next; `channels`: read from each of them.
void make_forward_taps(const AxisShape& y, const AxisShape& x, int64_t ld, int64_t channels, TapStorage& out);
void make_backward_taps(const AxisShape& y, const AxisShape& x, int64_t ld, int64_t channels, TapStorage& out);

}  // namespace mtmlk
