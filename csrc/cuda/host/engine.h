// Runs kernels: the threads of a cluster are fibers of the thread that launches. run.h, schedule.h and meet.h have the
// functions.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>
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
  int cluster;    // blocks, along x
  bool overlaps;  // knows nothing of earlier launches until its threads wait for them
};

class Engine {
 public:
  void run(const Shape& shape, Job job);

  // Of fibers.
  void meet(Barrier& barrier, Place place);
  void meet(Warp& warp, int meeting, Place place, bool orders);
  void fence();
  void wait_for_earlier();
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
  void forget_fibers(size_t most);

  void arrive(Meeting& meeting, Place place, bool orders);
  void wait();
  void release(const Meeting& meeting, Thread* members, int count);
  Thread& take();
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
  Fiber* previous_ = nullptr;   // of the fiber that runs
  std::vector<void*> watched_;  // fibers that ended, as ThreadSanitizer knows them
  // What ThreadSanitizer knows by these addresses; and a fiber that knows what came before the last launch that did not
  // overlap.
  char ended_ = 0, fenced_ = 0, earlier_ = 0;
  void* before_ = nullptr;
};

inline Engine& engine() {
  static thread_local Engine one;
  return one;
}

}  // namespace host
}  // namespace mtmlk
