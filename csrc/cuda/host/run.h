// A launch: cluster after cluster, in the order that order.h says.
#pragma once

#include <stddef.h>
#include <stdio.h>

#include <vector>

#include "cuda/host/schedule.h"

namespace mtmlk {
namespace host {

inline void Engine::run(const Shape& shape, Job job) {
  {
    tsan::Quiet quiet;
    shape_ = shape, job_ = job;
    tsan::publish(&earlier_, true);
    if (!shape.overlaps) {
      if (before_ != nullptr) tsan::destroy(before_);
      before_ = tsan::create("before launches that overlap");
    }
    order_ = Order::current();
    const size_t clusters = size_t(shape.grid.x) * shape.grid.y * shape.grid.z / size_t(shape.cluster);
    for (size_t i = 0; i < clusters; ++i) {
      prepare(order_.cluster(i, clusters) * size_t(shape.cluster));
      start_fibers();
      end_fibers();
    }
    forget_fibers(0);
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
  thread.fiber.tsan = tsan::create_by(before_, name);
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
  for (Block& b : blocks_) b.shared.close();
  if (!kTsan) return;
  for (Thread& t : threads_) watched_.push_back(t.fiber.tsan);
  forget_fibers(1000);
}

// ThreadSanitizer shows where a fiber was only as long as it is remembered.
inline void Engine::forget_fibers(size_t most) {
  if (watched_.size() <= most) return;
  for (void* fiber : watched_) tsan::destroy(fiber);
  watched_.clear();
}

}  // namespace host
}  // namespace mtmlk
