// Convolutions of many tasks.
//
//   forward   y[t] = x[t] * W[t] + b[t]            x[t] [N, C, H, W], W[t] [O, C / G, kh, kw], b[t] [O]
//   backward  dx = dy *' W,  dW = dy *'' x,  db = sum dy
// where one W or b may stand for all tasks: its gradient is then a sum over them. A group of channels is a convolution of
// its own. The products are those of the engine (layers/conv/products.h), channels last; a unit of work, some samples of
// one task and group, goes there and back in a thread's own memory. What a unit covers depends on one task's sizes only.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/sizes.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "runtime/carver.h"
#include "runtime/stops.h"
#include "runtime/crew.h"
#include "inner_loop/plan/plan.h"
#include "layers/conv/layer.h"
#include "layers/conv/products.h"
#include "layers/params.h"
#include "task_conv2d/call.h"

namespace mtmlk {
namespace {

constexpr int64_t kUnitBytes = int64_t(256) << 10;  // of a unit's images, both ways
constexpr int64_t kGradPixels = 1024;               // summed in one chain of additions
constexpr int64_t kGradParts = 16;                  // partial sums of a weight's gradient

// Sizes of one group, and where its tensors lie.
struct ConvSizes {
  int64_t groups, channels, outputs, taps, height, width, out_height, out_width;
  int64_t pixels, out_pixels, ld, out_ld;  // rows of x as they are, of gradients padded to vectors
  int64_t samples;                         // in a unit
};

template <class T>
ConvSizes conv_sizes(const MtmlkTaskConv2d& c) {
  ConvSizes s = {};
  s.groups = c.groups, s.channels = c.channels / c.groups, s.outputs = c.outputs / c.groups;
  s.taps = c.kernel[0] * c.kernel[1];
  s.height = c.size[0], s.width = c.size[1], s.out_height = c.out[0], s.out_width = c.out[1];
  s.pixels = s.height * s.width, s.out_pixels = s.out_height * s.out_width;
  s.ld = round_up(s.channels, Simd<T>::kLanes), s.out_ld = round_up(s.outputs, Simd<T>::kLanes);
  const int64_t fit = kUnitBytes / ((s.pixels * s.ld + s.out_pixels * s.out_ld) * int64_t(sizeof(T)));
  s.samples = fit < 1 ? 1 : fit < c.samples ? fit : c.samples;
  return s;
}

// A thread's memory.
template <class T>
struct ConvScratch {
  T *x, *z;       // [samples, pixels, ld], [samples, out_pixels, out_ld]
  T *w, *turned;  // packed, and its transposed copy
  T* bias;

  ConvScratch(Carver c, const ConvSizes& s) : ConvScratch(&c, s) {}
  ConvScratch(Carver* c, const ConvSizes& s)
      : x(c->take<T>(s.samples * s.pixels * s.ld)),
        z(c->take<T>(s.samples * s.out_pixels * s.out_ld)),
        w(c->take<T>(s.taps * s.channels * s.out_ld)),
        turned(c->take<T>(s.taps * s.outputs * s.ld)),
        bias(c->take<T>(s.out_ld)) {}
};

template <class T>
int64_t task_conv2d_bytes(const MtmlkTaskConv2d& call) {
  Carver c = {nullptr, 0};
  ConvScratch<T>(&c, conv_sizes<T>(call));
  return c.used;
}

template <class T>
ConvScratch<T> conv_scratch(const Crew& crew, int slot, const ConvSizes& s) {
  return ConvScratch<T>(Carver{own_scratch<char>(crew, slot), 0}, s);
}

MTMLK_INLINE ParamPlan weight_plan(const ConvSizes& s) {
  ParamPlan p = {};
  p.layout = kConvWeight, p.rows = s.outputs, p.cols = s.channels * s.taps, p.taps = s.taps;
  return p;
}

MTMLK_INLINE Strides image_strides(int64_t pixels, int64_t width, int64_t ld) { return {pixels * ld, width * ld, ld}; }

// [n, channels of all groups, pixels] -> [n, pixels, ld], and back
template <class T>
void channels_last(const T* from, int64_t step, int64_t n, int64_t channels, int64_t pixels, int64_t ld, T* to) {
  for (int64_t i = 0; i < n; ++i) transpose_into<T>(from + i * step, channels, pixels, to + i * pixels * ld, ld);
}

template <class T>
void channels_first(const T* from, int64_t step, int64_t n, int64_t channels, int64_t pixels, int64_t ld, T* to) {
  for (int64_t i = 0; i < n; ++i) transpose_out_of<T>(from + i * pixels * ld, ld, channels, pixels, to + i * step);
}

// Some samples of one task and group: where they begin in x and y, and the task's weights of the group.
template <class T>
struct ConvUnit {
  int64_t task, group, samples, at_x, at_y;
  const T* weight;
};

template <class T>
ConvUnit<T> conv_unit(const MtmlkTaskConv2d& c, const ConvSizes& s, int64_t i) {
  const int64_t blocks = (c.samples + s.samples - 1) / s.samples, first = i % blocks * s.samples;
  ConvUnit<T> u = {};
  u.group = i / blocks % s.groups, u.task = i / blocks / s.groups;
  u.samples = c.samples - first < s.samples ? c.samples - first : s.samples;
  const int64_t sample = u.task * c.samples + first;
  u.at_x = (sample * c.channels + u.group * s.channels) * s.pixels;
  u.at_y = (sample * c.outputs + u.group * s.outputs) * s.out_pixels;
  const int64_t block = (c.weights == 1 ? 0 : u.task) * s.groups + u.group;
  u.weight = static_cast<const T*>(c.weight) + block * s.outputs * s.channels * s.taps;
  return u;
}

// body(unit, a thread's memory) for all units.
template <class T, class Body>
void each_conv_unit(const TaskConvCall& call, const ConvSizes& s, const Crew& crew, Body body) {
  const MtmlkTaskConv2d& c = *call.conv;
  const int64_t blocks = (c.samples + s.samples - 1) / s.samples;
  share(crew, c.tasks * s.groups * blocks,
        [&](int64_t i, int slot) { body(conv_unit<T>(c, s, i), conv_scratch<T>(crew, slot, s)); });
}

template <class T>
void task_conv2d_forward(const TaskConvCall& call, const Crew& crew) {
  const MtmlkTaskConv2d& c = *call.conv;
  const ConvSizes s = conv_sizes<T>(c);
  const T *x = static_cast<const T*>(c.x), *bias = static_cast<const T*>(c.bias);
  T* const y = static_cast<T*>(c.y);
  each_conv_unit<T>(call, s, crew, [&](const ConvUnit<T>& u, const ConvScratch<T>& own) {
    channels_last<T>(x + u.at_x, c.channels * s.pixels, u.samples, s.channels, s.pixels, s.channels, own.x);
    pack_conv<T>(weight_plan(s), u.weight, own.w);
    if (bias)
      pack_rows<T>(bias + (c.biases == 1 ? 0 : u.task) * c.outputs + u.group * s.outputs, 1, s.outputs, own.bias);
    Gather<T> g = {};
    g.c = own.z, g.bias = bias ? own.bias : nullptr, g.p1 = {own.x, own.w};
    g.to = image_strides(s.out_pixels, s.out_width, s.out_ld);
    g.from = image_strides(s.pixels, s.width, s.channels);
    g.weight_rows = s.taps * s.channels, g.n = s.out_ld;
    gather<T>(*call.forward, g, {0, u.samples}, {0, s.out_height});
    channels_first<T>(own.z, c.outputs * s.out_pixels, u.samples, s.outputs, s.out_pixels, s.out_ld, y + u.at_y);
  });
}

template <class T>
void conv_input_gradients(const TaskConvCall& call, const ConvSizes& s, const Crew& crew) {
  const MtmlkTaskConv2d& c = *call.conv;
  const T* dy = static_cast<const T*>(c.grad);
  T* const dx = static_cast<T*>(c.dx);
  each_conv_unit<T>(call, s, crew, [&](const ConvUnit<T>& u, const ConvScratch<T>& own) {
    channels_last<T>(dy + u.at_y, c.outputs * s.out_pixels, u.samples, s.outputs, s.out_pixels, s.out_ld, own.z);
    pack_conv<T>(weight_plan(s), u.weight, own.w);
    transpose_param<T>(weight_plan(s), own.w, own.turned);
    Gather<T> g = {};
    g.c = own.x, g.p1 = {own.z, own.turned};
    g.to = image_strides(s.pixels, s.width, s.ld);
    g.from = image_strides(s.out_pixels, s.out_width, s.out_ld);
    g.weight_rows = s.taps * s.outputs, g.n = s.ld;
    gather<T>(*call.backward, g, {0, u.samples}, {0, s.height});
    channels_first<T>(own.x, c.channels * s.pixels, u.samples, s.channels, s.pixels, s.ld, dx + u.at_x);
  });
}

// Adds the gradient that `n` samples, which lie channels last in a thread's memory, contribute to a packed one.
template <class T>
void add_conv_gradient(const TaskConvCall& call, const ConvSizes& s, const ConvScratch<T>& own, int64_t n, T* to) {
  ConvGrad<T> g = {};
  g.c = to, g.weight_rows = s.taps * s.channels, g.n = s.out_ld;
  g.a = image_strides(s.pixels, s.width, s.channels), g.b = image_strides(s.out_pixels, s.out_width, s.out_ld);
  g.p1 = {own.x, own.z};
  const int64_t fit = kGradPixels / s.out_width, rows = fit < 1 ? 1 : fit < s.out_height ? fit : s.out_height;
  const int64_t many = kGradPixels / (rows * s.out_width), some = many < 1 ? 1 : many;
  for (int64_t i = 0; i < n; i += some)
    for (int64_t r = 0; r < s.out_height; r += rows)
      conv_grad<T>(*call.forward, g, clipped(i, some, n), clipped(r, rows, s.out_height));
}

// How the samples behind one weight's gradient are cut into parts, each with a sum of its own.
MTMLK_INLINE int64_t grad_parts(const MtmlkTaskConv2d& c, const ConvSizes& s) {
  const int64_t blocks = c.tasks * ((c.samples + s.samples - 1) / s.samples);
  return c.weights > 1 ? 1 : blocks < kGradParts ? blocks : kGradParts;
}

// Of the sums of partial gradients that lie in memory which the threads share.
template <class T>
int64_t task_conv2d_sums(const MtmlkTaskConv2d& c) {
  const ConvSizes s = conv_sizes<T>(c);
  return c.weights * s.groups * grad_parts(c, s) * s.taps * s.channels * s.out_ld * int64_t(sizeof(T));
}

// Units [first, last) of a group's, blocks of one weight's samples, into one packed sum.
template <class T>
void conv_grad_part(const TaskConvCall& call, const ConvSizes& s, int64_t weight, int64_t group, int64_t first,
                    int64_t last, const ConvScratch<T>& own, Watch* watch, T* sum) {
  const MtmlkTaskConv2d& c = *call.conv;
  const int64_t blocks = (c.samples + s.samples - 1) / s.samples;
  fill_zero<T>(sum, s.taps * s.channels * s.out_ld);
  for (int64_t b = first; b < last && !stops(watch); ++b) {
    const int64_t task = c.weights == 1 ? b / blocks : weight;
    const ConvUnit<T> u = conv_unit<T>(c, s, (task * s.groups + group) * blocks + b % blocks);
    channels_last<T>(static_cast<const T*>(c.x) + u.at_x, c.channels * s.pixels, u.samples, s.channels, s.pixels,
                     s.channels, own.x);
    channels_last<T>(static_cast<const T*>(c.grad) + u.at_y, c.outputs * s.out_pixels, u.samples, s.outputs,
                     s.out_pixels, s.out_ld, own.z);
    add_conv_gradient<T>(call, s, own, u.samples, sum);
  }
}

template <class T>
void conv_weight_gradients(const TaskConvCall& call, const ConvSizes& s, void* sums, const Crew& crew) {
  const MtmlkTaskConv2d& c = *call.conv;
  const int64_t parts = grad_parts(c, s), size = s.taps * s.channels * s.out_ld;
  const int64_t blocks = (c.samples + s.samples - 1) / s.samples * (c.weights == 1 ? c.tasks : 1);
  T* const all = static_cast<T*>(sums);
  share(crew, c.weights * s.groups * parts, [&](int64_t i, int slot) {
    const int64_t part = i % parts, group = i / parts % s.groups, weight = i / parts / s.groups;
    const ConvScratch<T> own = conv_scratch<T>(crew, slot, s);
    conv_grad_part<T>(call, s, weight, group, blocks * part / parts, blocks * (part + 1) / parts, own, crew.watch,
                      all + i * size);
  });
  const int64_t elements = s.outputs * s.channels * s.taps;
  share(crew, c.weights * s.groups, [&](int64_t i, int) {
    T* const sum = all + i * parts * size;
    store_parts<T>(sum, parts, size, size, nullptr, T(1), sum);
    unpack_conv<T>(weight_plan(s), sum, static_cast<T*>(c.dw) + i * elements);
  });
}

// db: of every image in parts, since long chains of additions lose digits.
template <class T>
void conv_bias_gradients(const MtmlkTaskConv2d& c, int64_t pixels, const Crew& crew) {
  const int64_t samples = c.tasks * c.samples / c.biases;
  share(crew, c.biases * c.outputs, [&](int64_t i, int) {
    T total = 0;
    for (int64_t n = 0; n < samples && !stops(crew.watch); ++n) {
      const int64_t image = (i / c.outputs * samples + n) * c.outputs + i % c.outputs;
      const T* from = static_cast<const T*>(c.grad) + image * pixels;
      VecOf<T> sum = {};
      for (int64_t p = 0; p < pixels; p += Simd<T>::kLanes) sum += load_some<T>(from + p, pixels - p);
      total += sum_lanes<T>(sum);
    }
    static_cast<T*>(c.db)[i] = total;
  });
}

template <class T>
void task_conv2d_backward(const TaskConvCall& call, void* sums, const Crew& crew) {
  const MtmlkTaskConv2d& c = *call.conv;
  const ConvSizes s = conv_sizes<T>(c);
  if (c.dx) conv_input_gradients<T>(call, s, crew);
  if (c.dw) conv_weight_gradients<T>(call, s, sums, crew);
  if (c.db) conv_bias_gradients<T>(c, s.out_pixels, crew);
}

}  // namespace
}  // namespace mtmlk
