// Which inputs each output of a convolution reads, worked out once per plan.
//
// Neighbouring destinations that read through the same taps form a rectangle, inside which nothing has to be tested for
// the image's border, and taps outside the image cost nothing. Forward, destinations are outputs and sources inputs;
// for the gradient of the input it is the other way round. Plain arrays: the per-ISA files read this.
#pragma once

#include <stdint.h>

namespace mtmlk {

// k elements in a row of one source pixel (or of several, where pixels lie without a gap), and their weight rows.
struct TapRun {
  int64_t source;      // offset in the source's sample
  int64_t weight_row;  // tap * channels + channel
  int64_t k;
};

// Runs summed in one chain of additions.
struct TapPart {
  int64_t first, runs;
};

// Destinations y, y + y_step, ... and x, x + x_step, ...; their sources are a source step apart.
struct TapRect {
  int64_t y, y_step, y_count, y_source_step;
  int64_t x, x_step, x_count, x_source_step;
  int64_t n_parts, n_runs;
  const TapPart* parts;
  const TapRun* runs;
};

// All destinations of a sample, cut into rectangles.
struct TapPlan {
  int64_t n_rects;
  const TapRect* rects;
};

}  // namespace mtmlk
