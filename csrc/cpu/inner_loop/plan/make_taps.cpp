#include "inner_loop/plan/make_taps.h"

#include <algorithm>

namespace mtmlk {
namespace {

// Along one axis: destinations that read through the same taps.
struct Segment {
  int64_t start, step, count;  // destinations start, start + step, ...
  int64_t source_step;         // and how far their sources are apart
  std::vector<int64_t> taps;
  std::vector<int64_t> sources;  // of the first destination, one a tap
};

// Longer chains of additions lose digits; gemm.h has the same bound.
constexpr int64_t kChain = 256;

// Appends a destination to the last segment where it continues it, else begins another.
void place(std::vector<Segment>& segments, int64_t at, int64_t step, int64_t source_step, std::vector<int64_t> taps,
           std::vector<int64_t> sources) {
  if (!segments.empty()) {
    Segment& last = segments.back();
    if (last.taps == taps && last.start + last.count * step == at && last.step == step) {
      ++last.count;
      return;
    }
  }
  segments.push_back({at, step, 1, source_step, std::move(taps), std::move(sources)});
}

std::vector<Segment> forward_axis(const AxisShape& a) {
  std::vector<Segment> segments;
  for (int64_t o = 0; o < a.out; ++o) {
    std::vector<int64_t> taps, sources;
    for (int64_t t = 0; t < a.kernel; ++t) {
      const int64_t i = o * a.stride - a.pad + t * a.dilation;
      if (i >= 0 && i < a.in) taps.push_back(t), sources.push_back(i);
    }
    place(segments, o, 1, a.stride, std::move(taps), std::move(sources));
  }
  return segments;
}

// Inputs `stride` apart read through the same taps, from neighbouring outputs.
std::vector<Segment> backward_axis(const AxisShape& a) {
  std::vector<Segment> segments;
  for (int64_t residue = 0; residue < std::min(a.stride, a.in); ++residue)
    for (int64_t i = residue; i < a.in; i += a.stride) {
      std::vector<int64_t> taps, sources;
      for (int64_t t = 0; t < a.kernel; ++t) {
        const int64_t scaled = i + a.pad - t * a.dilation;
        if (scaled >= 0 && scaled % a.stride == 0 && scaled / a.stride < a.out)
          taps.push_back(t), sources.push_back(scaled / a.stride);
      }
      place(segments, i, a.stride, 1, std::move(taps), std::move(sources));
    }
  return segments;
}

struct Source {
  int64_t width, ld, channels, kernel_x;
};

// The runs of one rectangle: taps of a row whose pixels and weights both follow each other are one run.
void add_runs(const Segment& y, const Segment& x, const Source& s, TapStorage& out) {
  std::vector<TapRun> runs;
  for (size_t ty = 0; ty < y.taps.size(); ++ty)
    for (size_t tx = 0; tx < x.taps.size(); ++tx) {
      const TapRun run = {(y.sources[ty] * s.width + x.sources[tx]) * s.ld,
                          (y.taps[ty] * s.kernel_x + x.taps[tx]) * s.channels, s.channels};
      TapRun* last = runs.empty() ? nullptr : &runs.back();
      if (last && last->source + last->k == run.source && last->weight_row + last->k == run.weight_row)
        last->k += run.k;
      else
        runs.push_back(run);
    }
  for (const TapRun& run : runs)
    for (int64_t at = 0; at < run.k; at += kChain)
      out.runs.push_back({run.source + at, run.weight_row + at, std::min(kChain, run.k - at)});
}

void make_rects(const std::vector<Segment>& ys, const std::vector<Segment>& xs, const Source& s, TapStorage& out) {
  std::vector<std::pair<size_t, size_t>> firsts;  // pointers are set once the vectors have stopped growing
  for (const Segment& y : ys)
    for (const Segment& x : xs) {
      const size_t first_run = out.runs.size(), first_part = out.parts.size();
      add_runs(y, x, s, out);
      int64_t length = kChain;
      for (size_t r = first_run; r < out.runs.size(); ++r) {
        if (length + out.runs[r].k > kChain) {
          out.parts.push_back({int64_t(r - first_run), 0});
          length = 0;
        }
        ++out.parts.back().runs;
        length += out.runs[r].k;
      }
      out.rects.push_back({y.start, y.step, y.count, y.source_step, x.start, x.step, x.count, x.source_step,
                           int64_t(out.parts.size() - first_part), int64_t(out.runs.size() - first_run), nullptr,
                           nullptr});
      firsts.push_back({first_part, first_run});
    }
  for (size_t i = 0; i < out.rects.size(); ++i) {
    out.rects[i].parts = out.parts.data() + firsts[i].first;
    out.rects[i].runs = out.runs.data() + firsts[i].second;
  }
  out.plan = {int64_t(out.rects.size()), out.rects.data()};
}

}  // namespace

void make_forward_taps(const AxisShape& y, const AxisShape& x, int64_t ld, int64_t channels, TapStorage& out) {
  make_rects(forward_axis(y), forward_axis(x), {x.in, ld, channels, x.kernel}, out);
}

void make_backward_taps(const AxisShape& y, const AxisShape& x, int64_t ld, int64_t channels, TapStorage& out) {
  make_rects(backward_axis(y), backward_axis(x), {x.out, ld, channels, x.kernel}, out);
}

}  // namespace mtmlk
