// Threads meet, and go on when all are there.
#pragma once

#include "cuda/host/schedule.h"

namespace mtmlk {
namespace host {

inline void Engine::arrive(Meeting& meeting, Place place, bool orders) {
  if (meeting.arrived == 0) meeting.place = place;
  if (!same(meeting.place, place))
    fault(place, "divergent barrier: others of its threads wait at %s:%d", meeting.place.file, meeting.place.line);
  if (orders) tsan::publish(&meeting.order, meeting.arrived == 0);
  ++meeting.arrived;
  self().waits = &meeting;
}

inline void Engine::meet(Barrier& barrier, Place place) {
  Meeting& meeting = barrier.open();
  arrive(meeting, place, true);
  if (meeting.arrived == barrier.alive) {
    ++barrier.generation;
    meeting.arrived = 0;
    release(meeting, barrier.members, barrier.count);
  }
  wait();
  tsan::receive(&meeting.order);
}

inline void Engine::meet(Warp& warp, int number, Place place, bool orders) {
  Meeting& meeting = warp.meetings[number];
  arrive(meeting, place, orders);
  if (meeting.arrived == meeting.lanes) {
    meeting.leaving = meeting.lanes;
    meeting.arrived = 0;
    Thread* first = &self() - self().lane;
    release(meeting, first, kLanes - __builtin_clz(meeting.mask));
  }
  wait();
  if (orders) tsan::receive(&meeting.order);
}

// CUDA's fences order what a thread did before with what it does later, in the eyes of threads that fence, too.
inline void Engine::fence() {
  tsan::publish_more(&fenced_);
  tsan::receive(&fenced_);
}

inline void Engine::wait_for_earlier() {
  self().copies.may_have_read();
  tsan::receive(&earlier_);
}

}  // namespace host
}  // namespace mtmlk
