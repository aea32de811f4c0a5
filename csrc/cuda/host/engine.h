// Runs a kernel: cluster after cluster, the threads of one as fibers of the thread that launches.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <memory>
#include <utility>
#include <vector>

#include "cuda/host/order.h"
#include "cuda/host/stacks.h"
#include "cuda/host/thread.h"

namespace mtmlk {
namespace host {

// The kernel with its arguments.
struct Job {
  void (*call)(const void* bound);
  const void* bound;
};

struct Shape {
  dim3 grid, block;
  size_t shared_bytes;
  int cluster;  // blocks, along x
};

class Engine {
 public:
  void run(const Shape& shape, Job job);

  // Of fibers.
  void meet(Barrier& barrier, Place place);
  void meet(Warp& warp, int meeting, Place place, bool orders);
  void fence();
  Block& peer(int rank) { return blocks_[size_t(rank)]; }
  Barrier& cluster() { return cluster_; }
  const Shape& shape() const { return shape_; }

 private:
  static void begin_fiber();
  void prepare(size_t first_block);
  void prepare(Block& block, size_t number);
  void prepare(Thread& thread, Block& block, unsigned number);
  void start_fibers();
  void end_fibers();

  void arrive(Meeting& meeting, Place place, bool orders);
  void wait();
  void release(const Meeting& meeting, Thread* members, int count);
  Thread& take();
  void go_on(Thread& next);
  Fiber* retire(Thread& thread);
  void end(Block& block);
  void leave(Barrier& barrier);
  void leave(Warp& warp, const Thread& thread);
  [[noreturn]] void lost() const;

  Shape shape_;
  Job job_;
  Order order_ = Order::current();
  std::vector<Block> blocks_;    // of one cluster
  std::vector<Thread> threads_;  // block by block
  std::unique_ptr<Warp[]> warps_;
  size_t warp_count_ = 0;
  std::vector<Thread*> ready_;
  Barrier cluster_;
  Stacks stacks_;
  Fiber launcher_;
  Fiber* previous_ = nullptr;    // of the fiber that runs
  char ended_ = 0, fenced_ = 0;  // what ThreadSanitizer knows by these addresses
};

inline Engine& engine() {
  static thread_local Engine one;
  return one;
}

// ---------------------------------------------------------------- a launch

inline void Engine::run(const Shape& shape, Job job) {
  {
    tsan::Quiet quiet;
    shape_ = shape, job_ = job;
    order_ = Order::current();
    const size_t clusters = size_t(shape.grid.x) * shape.grid.y * shape.grid.z / size_t(shape.cluster);
    for (size_t i = 0; i < clusters; ++i) {
      prepare(order_.cluster(i, clusters) * size_t(shape.cluster));
      start_fibers();
      end_fibers();
    }
  }
  tsan::receive(&ended_);
}

inline void Engine::prepare(size_t first_block) {
  const size_t blocks = size_t(shape_.cluster), each = size_t(shape_.block.x) * shape_.block.y * shape_.block.z;
  const size_t warps = blocks * ((each + kLanes - 1) / kLanes);
  if (blocks_.size() < blocks) blocks_ = std::vector<Block>(blocks);
  if (threads_.size() != blocks * each) threads_ = std::vector<Thread>(blocks * each);
  if (warp_count_ < warps) warps_.reset(new Warp[warps]), warp_count_ = warps;
  stacks_.reserve(threads_.size());
  cluster_ = {threads_.data(), int(threads_.size()), int(threads_.size()), 0, {}};
  ready_.clear();
  for (size_t i = 0; i < blocks; ++i) {
    blocks_[i].rank = int(i);
    prepare(blocks_[i], first_block + i);
  }
}

inline void Engine::prepare(Block& block, size_t number) {
  const unsigned x = shape_.grid.x, y = shape_.grid.y;
  const unsigned each = shape_.block.x * shape_.block.y * shape_.block.z;
  Thread* threads = threads_.data() + size_t(block.rank) * each;
  block.index = dim3(unsigned(number % x), unsigned(number / x % y), unsigned(number / x / y));
  block.alive = int(each);
  block.barrier = {threads, int(each), int(each), 0, {}};
  block.shared.open(shape_.shared_bytes);
  Warp* warps = warps_.get() + size_t(block.rank) * ((each + kLanes - 1) / kLanes);
  for (unsigned i = 0; i < each; ++i) {
    threads[i].warp = warps + i / kLanes;
    if (i % kLanes == 0) threads[i].warp->alive = 0;
    prepare(threads[i], block, i);
  }
}

inline void Engine::prepare(Thread& thread, Block& block, unsigned number) {
  const size_t stack = size_t(&thread - threads_.data());
  thread.index =
      dim3(number % shape_.block.x, number / shape_.block.x % shape_.block.y, number / shape_.block.x / shape_.block.y);
  thread.lane = int(number % kLanes);
  thread.block = &block;
  thread.engine = this;
  thread.warp->alive |= 1u << thread.lane;
  thread.copies.clear();
  thread.fiber.bottom = stacks_.bottom(stack), thread.fiber.bytes = stacks_.bytes(stack);
  thread.fiber.fake = nullptr;
  forget_frames(thread.fiber);
  prepare_context(&thread.fiber.context, stacks_.bottom(stack), stacks_.bytes(stack), begin_fiber);
  if (!kTsan) return;
  char name[96];
  snprintf(name, sizeof name, "block (%u, %u, %u) thread (%u, %u, %u)", block.index.x, block.index.y, block.index.z,
           thread.index.x, thread.index.y, thread.index.z);
  thread.fiber.tsan = tsan::create(name);
}

inline void Engine::start_fibers() {
  launcher_.tsan = tsan::current();
  for (Thread& t : threads_) t.waits = cluster_.meetings;
  release(cluster_.meetings[0], cluster_.members, cluster_.count);
  running = &take();
  previous_ = &launcher_;
  switch_fiber(launcher_, running->fiber);
  arrived(launcher_, *previous_);
}

inline void Engine::end_fibers() {
  running = nullptr;
  for (Thread& t : threads_) tsan::destroy(t.fiber.tsan);
  for (Block& b : blocks_) b.shared.close();
}

// ---------------------------------------------------------------- a fiber

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

// ---------------------------------------------------------------- meetings

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
  Thread* lanes = &self() - self().lane;
  if (meeting.arrived == __builtin_popcount(meeting.mask)) {
    meeting.leaving = meeting.arrived;
    meeting.arrived = 0;
    release(meeting, lanes, kLanes - __builtin_clz(meeting.mask));
  }
  wait();
  if (orders) tsan::receive(&meeting.order);
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

// CUDA's fences order what a thread did before with what it does later, in the eyes of threads that fence, too.
inline void Engine::fence() {
  tsan::publish_more(&fenced_);
  tsan::receive(&fenced_);
}

inline void Engine::lost() const {
  for (size_t i = 0; i < threads_.size(); ++i) {
    const Meeting* meeting = threads_[i].waits;
    if (meeting == nullptr || (i > 0 && meeting == threads_[i - 1].waits)) continue;
    size_t same = i;
    while (same < threads_.size() && threads_[same].waits == meeting) ++same;
    const dim3 b = threads_[i].block->index;
    fprintf(stderr, "%s:%d: block (%u, %u, %u): %zu neighbouring threads wait here\n", meeting->place.file,
            meeting->place.line, b.x, b.y, b.z, same - i);
  }
  fail("lost barrier: every thread waits for one that will not come");
}

}  // namespace host
}  // namespace mtmlk
