// Stacks for fibers, kept from launch to launch by the thread that launches.
#pragma once

#include <stddef.h>
#include <sys/mman.h>

#include "cuda/host/fail.h"
#include "cuda/host/sanitizer.h"

namespace mtmlk {
namespace host {

class Stacks {
 public:
  static constexpr size_t kBytes = (kTsan || kAsan ? 256 : 64) * 1024;

  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { release(); }

  // At least n. For ThreadSanitizer they are new ones: what ran on them before is not to be a race with what will.
  void reserve(size_t n) {
    if (!kTsan && n <= count_) return;
    release();
    base_ = static_cast<char*>(
        mmap(nullptr, n * kStride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) fail("no memory for the stacks of %zu threads", n);
    count_ = n;
    for (size_t i = 0; i < n; ++i) mprotect(base_ + i * kStride, kGuard, PROT_NONE);
  }
  char* bottom(size_t i) const { return base_ + i * kStride + kGuard; }
  // Tops differ in their low bits, else all frames fall into the same few lines of the cache.
  size_t bytes(size_t i) const { return kBytes - i % 64 * 64; }

 private:
  static constexpr size_t kGuard = 4096;  // a stack that overflows ends the process instead of its neighbour
  static constexpr size_t kStride = kGuard + kBytes;

  void release() {
    if (count_ > 0) munmap(base_, count_ * kStride);
    count_ = 0;
  }

  char* base_ = nullptr;
  size_t count_ = 0;
};

}  // namespace host
}  // namespace mtmlk
