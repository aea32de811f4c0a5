// Which inputs each output of a convolution reads, worked out once per plan.
//
// Along one axis, neighbouring destinations that read through the same taps form a segment; a rectangle of two segments
// needs no test for the image's border, and taps outside the image cost nothing. Forward, destinations are outputs and
// sources inputs; for the gradient of the input it is the other way round.
#pragma once

#include <stdint.h>

#include <vector>

namespace mtmlk {

struct Segment {
  int64_t start, step, count;  // destinations start, start + step, ...
  int64_t source_step;         // and how far their sources are apart
  std::vector<int64_t> taps;
  std::vector<int64_t> sources;  // of the first destination, one a tap
};

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

struct TapStorage {
  std::vector<TapRun> runs;
  std::vector<TapPart> parts;
  std::vector<TapRect> rects;
  TapPlan plan;
};

struct AxisShape {
  int64_t in, out, kernel, stride, pad, dilation;
};

// `width`: of the source image; `ld`: elements from one source pixel to the next; `channels`: read from each of them.
void make_forward_taps(const AxisShape& y, const AxisShape& x, int64_t ld, int64_t channels, TapStorage& out);
void make_backward_taps(const AxisShape& y, const AxisShape& x, int64_t ld, int64_t channels, TapStorage& out);

}  // namespace mtmlk
