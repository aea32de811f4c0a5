// Between the tensors of a module and the packed parameters of the engine.
#pragma once

#include <stdint.h>

#include "mtml/sizes.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "inner_loop/plan/plan.h"

namespace mtmlk {
namespace {

// weight [O, C, taps] -> packed [taps * C, O], and back
template <class T, class Each>
MTMLK_INLINE void each_conv_element(const ParamPlan& p, Each each) {
  const int64_t channels = p.cols / p.taps;
  each_panel<T>(p.cols, p.rows, [&](int64_t start, int64_t col, int64_t width) {
    for (int64_t tap = 0; tap < p.taps; ++tap)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t o = 0; o < width; ++o) each(start + (tap * channels + c) * width + o, col + o, c * p.taps + tap);
  });
}

template <class T>
void pack_conv(const ParamPlan& p, const T* src, T* dst) {
  each_conv_element<T>(p, [&](int64_t at, int64_t output, int64_t element) {
    dst[at] = output < p.rows ? src[output * p.cols + element] : T(0);
  });
}

template <class T>
void unpack_conv(const ParamPlan& p, const T* src, T* dst) {
  each_conv_element<T>(p, [&](int64_t at, int64_t output, int64_t element) {
    if (output < p.rows) dst[output * p.cols + element] = src[at];
  });
}

// weight [I, O] -> packed as one [O, I] is, and back; element -1: padding
template <class T, class Each>
MTMLK_INLINE void each_in_out_element(const ParamPlan& p, Each each) {
  const int64_t ld = round_up(p.cols, Simd<T>::kLanes);
  for (int64_t o = 0; p.narrow && o < p.rows; ++o)
    for (int64_t i = 0; i < ld; ++i) each(o * ld + i, i < p.cols ? i * p.rows + o : -1);
  if (p.narrow) return;
  each_panel<T>(p.cols, p.rows, [&](int64_t start, int64_t col, int64_t width) {
    for (int64_t i = 0; i < p.cols; ++i)
      for (int64_t o = 0; o < width; ++o) each(start + i * width + o, col + o < p.rows ? i * p.rows + col + o : -1);
  });
}

template <class T>
void pack_param(const ParamPlan& p, const T* src, T* dst) {
  if (p.in_out)
    each_in_out_element<T>(p, [&](int64_t at, int64_t element) { dst[at] = element < 0 ? T(0) : src[element]; });
  else if (p.layout == kConvWeight)
    pack_conv<T>(p, src, dst);
  else if (p.layout == kLinearWeight && !p.narrow)
    pack_weight<T>(src, p.rows, p.cols, dst);
  else
    pack_rows<T>(src, p.rows, p.cols, dst);
}

template <class T>
void unpack_param(const ParamPlan& p, const T* src, T* dst) {
  if (p.in_out)
    each_in_out_element<T>(p, [&](int64_t at, int64_t element) {
      if (element >= 0) dst[element] = src[at];
    });
  else if (p.layout == kConvWeight)
    unpack_conv<T>(p, src, dst);
  else if (p.layout == kLinearWeight && !p.narrow)
    unpack_weight<T>(src, p.rows, p.cols, dst);
  else
    unpack_rows<T>(src, p.rows, p.cols, dst);
}

// The transposed copy of a packed weight: [O, I], or of a convolution's [taps * O, C].
template <class T>
void transpose_param(const ParamPlan& p, const T* src, T* dst) {
  const int64_t channels = p.cols / p.taps;
  for (int64_t tap = 0; tap < p.taps; ++tap)
    transpose_packed<T>(src, channels, p.rows, p.cols, p.taps * p.rows, tap * channels, tap * p.rows, dst);
}

// Threads share a packed weight by its panels.
template <class T>
int64_t parts_of(const ParamPlan& p) {
  const bool panels = p.layout == kLinearWeight && !p.narrow && !p.in_out;
  return panels ? (p.rows + kPanelWidth<T> - 1) / kPanelWidth<T> : 1;
}

template <class T>
int64_t outputs_of_part(const ParamPlan& p, int64_t part) {
  const int64_t left = p.rows - part * kPanelWidth<T>;
  return left < kPanelWidth<T> ? left : kPanelWidth<T>;
}

// A part of the packed parameter and of its transposed copy, where it has one (dst_t is not nullptr).
template <class T>
void pack_part(const ParamPlan& p, int64_t part, const T* src, T* dst, T* dst_t) {
  if (parts_of<T>(p) == 1) {
    pack_param<T>(p, src, dst);
    if (dst_t) transpose_param<T>(p, dst, dst_t);
    return;
  }
  const int64_t output = part * kPanelWidth<T>, outputs = outputs_of_part<T>(p, part), at = output * p.cols;
  pack_weight<T>(src + at, outputs, p.cols, dst + at);
  if (dst_t) transpose_packed<T>(dst + at, p.cols, outputs, p.cols, p.rows, 0, output, dst_t);
}

template <class T>
void unpack_part(const ParamPlan& p, int64_t part, const T* src, T* dst) {
  if (parts_of<T>(p) == 1) return unpack_param<T>(p, src, dst);
  const int64_t at = part * kPanelWidth<T> * p.cols;
  unpack_weight<T>(src + at, outputs_of_part<T>(p, part), p.cols, dst + at);
}

}  // namespace
}  // namespace mtmlk
