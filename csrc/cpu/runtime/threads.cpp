// See threads.h.
#include "runtime/threads.h"

#include <atomic>

#include "mtml/abi.h"

namespace mtmlk {
namespace {

// Multiply-adds. Of calls from 2^19 to 2^24 (an MLP's loop with 2 to 64 tasks, a linear layer, cross-entropy; AVX-512),
// two threads are even with one at 2^20, which takes one 30 us, 1.3 times as fast at 2^21 and 1.7 times at 2^24.
constexpr double kShare = 1 << 19;

std::atomic<double> share{kShare};

}  // namespace

int threads_for(double work, int most) {
  const double worth = work / share.load(std::memory_order_relaxed);
  if (worth < 2 || most < 2) return 1;
  return worth < most ? int(worth) : most;
}

}  // namespace mtmlk

extern "C" void mtmlk_thread_work(double share) { mtmlk::share.store(share, std::memory_order_relaxed); }
