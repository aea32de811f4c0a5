// Which fiber runs: one until it waits or returns, then another that can.
#pragma once

#include <stddef.h>
#include <stdio.h>

#include <utility>

#include "cuda/host/engine.h"

namespace mtmlk {
namespace host {

MTMLK_UNWATCHED inline void Engine::begin_fiber() {
  arrived(running->fiber, *running->engine->previous_);
  Engine& engine = *running->engine;
  engine.job_.call(engine.job_.bound);
  Thread& thread = *running;
  Fiber* next = engine.retire(thread);
  switch_fiber(thread.fiber, *next, true);
  fail("a thread that had returned went on");
}

// Goes on with a fiber that can; this one stands in `ready_`, or some meeting waits for it to be complete.
inline void Engine::wait() {
  if (ready_.empty()) lost();
  Thread& me = self();
  Thread& next = take();
  if (&next == &me) return;
  running = &next;
  previous_ = &me.fiber;
  switch_fiber(me.fiber, next.fiber);
  arrived(me.fiber, *previous_);
}

inline Thread& Engine::take() {
  if (order_.draws()) std::swap(ready_[order_.draw(ready_.size())], ready_.back());
  Thread& next = *ready_.back();
  ready_.pop_back();
  return next;
}

// Those of the members who wait for the meeting can run. The last to be put down is the first to be taken.
inline void Engine::release(const Meeting& meeting, Thread* members, int count) {
  const auto put = [&](Thread& t) {
    if (t.waits == &meeting) ready_.push_back(&t), t.waits = nullptr;
  };
  if (order_.ascends())
    for (int i = count - 1; i >= 0; --i) put(members[i]);
  else
    for (int i = 0; i < count; ++i) put(members[i]);
}

// The fiber that goes on when this one ends.
inline Fiber* Engine::retire(Thread& thread) {
  tsan::Quiet quiet;
  Block& block = *thread.block;
  tsan::publish(&block.exits, block.alive == block.barrier.count);
  leave(*thread.warp, thread);
  leave(block.barrier);
  leave(cluster_);
  if (--block.alive == 0) end(block);
  tsan::publish_more(&ended_);
  if (ready_.empty() && cluster_.alive > 0) lost();
  previous_ = &thread.fiber;
  if (ready_.empty()) return &launcher_;
  running = &take();
  return &running->fiber;
}

// After it the block's shared memory is gone, for other blocks of the cluster, too.
inline void Engine::end(Block& block) {
  tsan::receive(&block.exits);
  block.shared.check();
  if (shape_.cluster > 1) block.shared.leave();
}

inline void Engine::leave(Barrier& barrier) {
  Meeting& meeting = barrier.open();
  if (--barrier.alive == 0 || meeting.arrived != barrier.alive) return;
  ++barrier.generation;
  meeting.arrived = 0;
  release(meeting, barrier.members, barrier.count);
}

inline void Engine::leave(Warp& warp, const Thread& thread) {
  warp.alive &= ~(1u << thread.lane);
  for (int i = 0; i < warp.used; ++i) {
    const Meeting& m = warp.meetings[i];
    if (m.arrived > 0 && (m.mask >> thread.lane & 1))
      fault(m.place, "lane %d has returned, and mask %08x of a _sync function names it", thread.lane, m.mask);
  }
}

inline void Engine::lost() const {
  for (size_t i = 0, next = 0; i < threads_.size(); i = next) {
    const Meeting* meeting = threads_[i].waits;
    while (next < threads_.size() && threads_[next].waits == meeting) ++next;
    if (meeting == nullptr) continue;
    const dim3 b = threads_[i].block->index;
    fprintf(stderr, "%s:%d: block (%u, %u, %u): %zu threads side by side wait here\n", meeting->place.file,
            meeting->place.line, b.x, b.y, b.z, next - i);
  }
  fail("lost barrier: every thread waits for one that will not come");
}

}  // namespace host
}  // namespace mtmlk
