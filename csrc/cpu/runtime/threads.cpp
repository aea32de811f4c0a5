// See threads.h.
#include "runtime/threads.h"

#include <atomic>

#include "mtml/abi.h"

namespace mtmlk {
namespace {

// Multiply-adds: a thread that sleeps is awake 5 us after it was called at the best and 50 at the worst, in which one
// that runs gets as much done.
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
