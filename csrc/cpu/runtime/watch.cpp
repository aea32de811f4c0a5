// See watch.h.
#include "runtime/watch.h"

#include <time.h>

#include <atomic>

#include "mtml/abi.h"

namespace mtmlk {
namespace {

constexpr int64_t kEveryMs = 100;  // to ask may take the GIL, which another thread gives away after 5 ms

std::atomic<int32_t (*)(void)> asked{nullptr};

// To a few milliseconds, which takes a quarter of the time that the exact one does.
int64_t now_ms() {
#if defined(CLOCK_MONOTONIC_COARSE)
  constexpr clockid_t kClock = CLOCK_MONOTONIC_COARSE;
#else
  constexpr clockid_t kClock = CLOCK_MONOTONIC;
#endif
  timespec t;
  clock_gettime(kClock, &t);
  return int64_t(t.tv_sec) * 1000 + t.tv_nsec / 1000000;
}

bool is_stopped(const Watch* watch) { return __atomic_load_n(&watch->stopped, __ATOMIC_RELAXED) != 0; }

}  // namespace

Watch start_watch() {
  Watch watch = {};
  watch.asks = asked.load(std::memory_order_relaxed) != nullptr;
  watch.caller = pthread_self();
  watch.next = watch.asks ? now_ms() + kEveryMs : 0;
  return watch;
}

bool ask_caller(Watch* watch) {
  if (!pthread_equal(pthread_self(), watch->caller) || !watch->asks) return is_stopped(watch);
  const int64_t now = now_ms();
  if (now < watch->next) return false;
  const int32_t answer = asked.load(std::memory_order_relaxed)();
  watch->next = now_ms() + kEveryMs;
  watch->asks = answer == MTMLK_GO_ON;
  if (answer == MTMLK_STOP) __atomic_store_n(&watch->stopped, 1, __ATOMIC_RELAXED);
  return answer == MTMLK_STOP;
}

}  // namespace mtmlk

extern "C" void mtmlk_when_long(int32_t (*ask)(void)) { mtmlk::asked.store(ask, std::memory_order_relaxed); }
