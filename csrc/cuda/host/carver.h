// SharedCarver on the CPU: a gap after each array, which the count of bytes leaves out.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cuda/host/thread.h"

namespace mtmlk {

class SharedCarver {
 public:
  SharedCarver() = default;
  explicit SharedCarver(char* base) : base_(base) {}

  template <class T>
  T* take(size_t n, host::Place place = host::here()) {
    static_assert(alignof(T) <= 16, "arrays are aligned to 16 bytes");
    bytes_ += round_up_16(n * sizeof(T));
    if (base_ == nullptr) return nullptr;
    const size_t begin = place_, end = begin + n * sizeof(T);
    place_ = round_up_16(end) + host::kGap;
    cut(begin, end, place);
    return reinterpret_cast<T*>(base_ + begin);
  }
  size_t bytes() const { return bytes_; }

 private:
  static size_t round_up_16(size_t bytes) { return (bytes + 15) / 16 * 16; }

  void cut(size_t begin, size_t end, host::Place place) {
    host::tsan::Quiet quiet;
    host::SharedMemory& shared = host::self().block->shared;
    if (base_ != shared.dynamic()) host::fault(place, "SharedCarver: expected dynamic_shared()");
    if (bytes_ > shared.bytes())
      host::fault(place, "SharedCarver: %zu bytes taken, %zu launched with", bytes_, shared.bytes());
    shared.cut(arrays_++, begin, end, place);
  }

  char* base_ = nullptr;
  size_t bytes_ = 0, place_ = 0, arrays_ = 0;
};

}  // namespace mtmlk
