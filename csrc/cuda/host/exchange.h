// Lanes of a warp meet, and show each other values.
//
// Stricter than hardware: all that meet do so at one line of the source, and a mask names no lane that does not exist or
// has returned.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cuda/host/meet.h"

namespace mtmlk {
namespace host {

// The meeting of a warp's lanes, as one of them sees it.
class Exchange {
 public:
  Exchange(uint32_t mask, Place place) : warp_(*self().warp), place_(place) {
    const Thread& t = self();
    if (!(mask >> t.lane & 1)) fault(place, "a _sync function whose mask %08x does not name its lane %d", mask, t.lane);
    if (mask & ~warp_.alive)
      fault(place, "mask %08x of a _sync function names lanes that do not exist or have returned", mask);
    number_ = warp_.find(mask);
  }
  ~Exchange() { --warp_.meetings[number_].leaving; }

  void meet(bool orders) { self().engine->meet(warp_, number_, place_, orders); }

  // Shows a value to the other lanes. As on hardware, this orders no accesses to memory.
  template <class V>
  void show(const V& value) {
    static_assert(sizeof(V) <= Warp::kValue, "a value of 32 bytes at most");
    memcpy(warp_.values[number_][self().lane], &value, sizeof(V));
    meet(false);
  }
  // What a lane showed; the i-th V of it.
  template <class V>
  V of(int lane, int i = 0) const {
    V value;
    memcpy(&value, warp_.values[number_][lane] + size_t(i) * sizeof(V), sizeof(V));
    return value;
  }
  // For each lane of the mask.
  template <class V, class F>
  void each(F use) const {
    for (int i = 0; i < kLanes; ++i)
      if (warp_.meetings[number_].mask >> i & 1) use(i, of<V>(i));
  }
  bool has(int lane) const { return warp_.meetings[number_].mask >> lane & 1; }

 private:
  Warp& warp_;
  Place place_;
  int number_;
};

// The value of lane `source`; the own one where that lies outside of the lanes' group.
template <class V>
V shuffle(uint32_t mask, V value, int source, int width, Place place) {
  tsan::Quiet quiet;
  Exchange lanes(mask, place);
  lanes.show(value);
  const int first = self().lane & ~(width - 1);
  if (source < first || source >= first + width) return value;
  if (!lanes.has(source)) fault(place, "a shuffle reads lane %d, which its mask %08x does not name", source, mask);
  return lanes.of<V>(source);
}

}  // namespace host
}  // namespace mtmlk
