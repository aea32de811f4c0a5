// All heads of a call.
//
// First a pass over the targets: labels are checked before they index anything, and the norm sum_i s_i v_i of every
// head is summed, so that the second pass writes the gradient fully scaled. Units are cut by a head's own shape and
// their sums are added in order: the bits depend neither on the threads nor on the heads beside.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/losses.h"
#include "simd/simd.h"
#include "runtime/stops.h"
#include "runtime/team.h"
#include "multihead_loss/call.h"
#include "multihead_loss/elements.h"
#include "multihead_loss/math.h"
#include "multihead_loss/softmax_rows.h"
#include "multihead_loss/softmax_tiles.h"

namespace mtmlk {
namespace {

// What the rows of a unit count for.
template <class T>
double unit_norm(const MtmlkHead& h, int64_t row0, int64_t row1) {
  const T* c = static_cast<const T*>(h.class_weights);
  const int64_t* y = static_cast<const int64_t*>(h.target);
  if (!h.sample_weights && !(h.ids && is_softmax(h.kind))) return double(row1 - row0);
  if (!h.sample_weights && !c) {
    int64_t counted = 0;
    for (int64_t row = row0; row < row1; ++row) counted += y[row] != h.ignore_index;
    return double(counted);
  }
  double norm = 0;
  for (int64_t row = row0; row < row1; ++row) {
    if (h.ids && y[row] == h.ignore_index) continue;
    norm += double(weight_of<T>(h, row)) * (h.ids && c ? double(c[y[row]]) : 1);
  }
  return norm;
}

inline int64_t first_bad_label(const MtmlkHead& h, int64_t row0, int64_t row1) {
  const int64_t* y = static_cast<const int64_t*>(h.target);
  int64_t wrong = 0;
  for (int64_t row = row0; row < row1; ++row)
    wrong |= int64_t(uint64_t(y[row]) >= uint64_t(h.classes)) & int64_t(y[row] != h.ignore_index);
  if (!wrong) return -1;
  for (int64_t row = row0;; ++row)
    if (uint64_t(y[row]) >= uint64_t(h.classes) && y[row] != h.ignore_index) return row;
}

template <class T>
void multihead_norms(const MultiheadCall& call) {
  each_piece(call.threads, call.n_units, call.watch, [&](int64_t i, int) {
    MultiheadUnit& u = call.units[i];
    const MtmlkHead& h = call.heads[u.head];
    u.bad = h.ids ? first_bad_label(h, u.row0, u.row1) : -1;
    u.norm = u.bad >= 0 || u.col0 > 0 ? 0 : unit_norm<T>(h, u.row0, u.row1);  // a row's first part speaks for it
  });
}

// Gradients beyond this are stored past the caches: nobody finds them there.
constexpr int64_t kPastCaches = int64_t(4) << 20;

template <class T>
double unit_loss(const MtmlkHead& h, const MultiheadUnit& u, double inverse, T* scratch) {
  if (!is_softmax(h.kind)) return element_rows<T>(h, u, inverse);
  const bool past = h.gradient && h.gradient != h.logits && h.rows * h.classes * int64_t(sizeof(T)) >= kPastCaches;
  double loss;
  if (h.inner > 1) {
    loss = softmax_pixels<T>(h, u.row0, u.row1, T(inverse), past, scratch, scratch + h.classes * kTileCols<T>);
  } else if (h.classes <= kShortVecs * Simd<T>::kLanes) {
    T* t = scratch + kShortVecs * kTileVecs * Simd<T>::kLanes * Simd<T>::kLanes;
    loss = softmax_short<T>(h, u.row0, u.row1, T(inverse), scratch, t);
  } else {
    loss = softmax_long<T>(h, u.row0, u.row1, T(inverse), past, scratch);
  }
  if (past) streams_done();
  return loss;
}

// `workspace`: of every thread, what multihead_scratch says.
template <class T>
void multihead_losses(const MultiheadCall& call, void* workspace, int64_t thread_bytes) {
  each_piece(call.threads, call.n_units, call.watch, [&](int64_t i, int slot) {
    MultiheadUnit& u = call.units[i];
    char* mine = static_cast<char*>(workspace) + thread_bytes * slot;
    u.loss = unit_loss<T>(call.heads[u.head], u, call.inverse[u.head], reinterpret_cast<T*>(mine));
  });
}

// Bytes of scratch that a head asks of a thread.
template <class T>
int64_t multihead_scratch(const MtmlkHead& h) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  if (!is_softmax(h.kind)) return 0;
  const int64_t size = h.inner > 1 ? 2 * h.classes * kTileCols<T> : 2 * kShortVecs * kTileVecs * kLanes * kLanes;
  return (size > h.classes ? size : h.classes + kLanes) * int64_t(sizeof(T));
}

}  // namespace
}  // namespace mtmlk
