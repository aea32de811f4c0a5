// See sleep.h.
#include "runtime/sleep.h"

#if defined(__linux__)

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace mtmlk {

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "a futex is the word itself");

void sleep_while(const std::atomic<uint32_t>& word, uint32_t seen, int ms) {
  const timespec most = {ms / 1000, ms % 1000 * 1000000L};
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, ms < 0 ? nullptr : &most, nullptr, 0);
}

void wake(const std::atomic<uint32_t>& word, int sleepers) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, sleepers, nullptr, nullptr, 0);
}

}  // namespace mtmlk

#else

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace mtmlk {
namespace {

struct Bed {
  std::mutex lock;
  std::condition_variable changed;
};

Bed& bed() {
  static Bed* instance = new Bed;  // never destroyed: threads sleep on it as the process ends
  return *instance;
}

}  // namespace

void sleep_while(const std::atomic<uint32_t>& word, uint32_t seen, int ms) {
  std::unique_lock<std::mutex> hold(bed().lock);
  if (word.load() != seen) return;
  if (ms < 0)
    bed().changed.wait(hold);
  else
    bed().changed.wait_for(hold, std::chrono::milliseconds(ms));
}

void wake(const std::atomic<uint32_t>&, int) {
  const std::lock_guard<std::mutex> hold(bed().lock);  // who has looked at the word sleeps by now
  bed().changed.notify_all();
}

}  // namespace mtmlk

#endif
