// A block's shared memory: what it has of it, and whether a kernel stayed inside.
//
// Fresh memory is full of NaN bits. Around the arrays there is room that belongs to none: AddressSanitizer reports an
// access there, and other builds look at the block's end whether it was written.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <vector>

#include "cuda/host/fail.h"
#include "cuda/host/sanitizer.h"

namespace mtmlk {
namespace host {

constexpr size_t kSharedLimit = 227 * 1024;       // of a block, on sm_90 and sm_100
constexpr size_t kStaticSharedLimit = 48 * 1024;  // of it, arrays with a name
constexpr size_t kGap = 64;                       // bytes after each array
constexpr size_t kArrays = 96;                    // of a SharedCarver
constexpr size_t kRoom = kArrays * (kGap + 16);   // for the gaps
constexpr unsigned char kPoison = 0xFF;           // NaN in float and double

class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() { close(); }

  void open(size_t bytes) {
    bytes_ = bytes;
    dynamic_ = fresh(bytes + kRoom);
    asan::poison(dynamic_ + bytes, kRoom);
  }

  char* dynamic() const { return dynamic_; }
  size_t bytes() const { return bytes_; }

  // The n-th array that a carver cuts: [begin, end) of the dynamic memory. Every thread cuts, and all alike.
  void cut(size_t n, size_t begin, size_t end, Place place) {
    if (n < cuts_.size()) {
      if (cuts_[n].begin == begin && cuts_[n].end == end) return;
      fail_at(place, "SharedCarver: array %zu has %zu bytes here and had %zu before: a block has one layout", n,
              end - begin, cuts_[n].end - cuts_[n].begin);
    }
    if (n >= kArrays) fail_at(place, "SharedCarver: more than %zu arrays", kArrays);
    if (n == 0) asan::poison(dynamic_, bytes_);
    asan::unpoison(dynamic_ + begin, end - begin);
    cuts_.push_back({begin, end, place});
  }

  // The array with a name that `key` stands for.
  char* named(const void* key, size_t bytes, Place place) {
    size_t all = bytes;
    for (const Named& a : named_) {
      if (a.key == key) return a.memory;
      all += a.bytes;
    }
    if (all > kStaticSharedLimit) fail_at(place, "SHARED_ARRAY: more than %zu bytes in a block", kStaticSharedLimit);
    if (all + bytes_ > kSharedLimit) fail_at(place, "SHARED_ARRAY: more than %zu bytes with the rest", kSharedLimit);
    named_.push_back({key, fresh(bytes + kGap), bytes, place});
    asan::poison(named_.back().memory + bytes, kGap);
    return named_.back().memory;
  }

  bool holds(const void* p, size_t bytes) const {
    if (inside(p, bytes, dynamic_, bytes_ + kRoom)) return true;
    for (const Named& a : named_)
      if (inside(p, bytes, a.memory, a.bytes)) return true;
    return false;
  }

  // What `p`, an address in `other`, is in this memory of a block of the same kernel; nullptr if it is not in `other`.
  char* same_place(const SharedMemory& other, const void* p) {
    const char* at = static_cast<const char*>(p);
    if (inside(p, 1, other.dynamic_, other.bytes_ + kRoom)) return dynamic_ + (at - other.dynamic_);
    for (const Named& a : other.named_)
      if (inside(p, 1, a.memory, a.bytes)) return named(a.key, a.bytes, a.place) + (at - a.memory);
    return nullptr;
  }

  // Is everything outside of the arrays as it was?
  void check() const {
    if (kAsan) return;
    if (cuts_.empty() && written(dynamic_ + bytes_, kRoom))
      fail("dynamic shared memory: written past the end of its %zu bytes", bytes_);
    for (size_t n = 0; n < cuts_.size(); ++n) {
      const size_t end = cuts_[n].end, next = n + 1 < cuts_.size() ? cuts_[n + 1].begin : bytes_ + kRoom;
      if (written(dynamic_ + end, next - end))
        fail_at(cuts_[n].place, "written past the end of this array of %zu bytes", end - cuts_[n].begin);
    }
    for (const Named& a : named_)
      if (written(a.memory + a.bytes, kGap))
        fail_at(a.place, "written past the end of this array of %zu bytes", a.bytes);
  }

  // For other blocks the memory is no more, though they may not know.
  void leave() {
    vanish(dynamic_, bytes_ + kRoom);
    for (const Named& a : named_) vanish(a.memory, a.bytes);
  }

  void close() {
    for (const Named& a : named_) drop(a.memory, a.bytes + kGap);
    if (dynamic_ != nullptr) drop(dynamic_, bytes_ + kRoom);
    named_.clear(), cuts_.clear();
    dynamic_ = nullptr;
  }

 private:
  struct Cut {
    size_t begin, end;
    Place place;
  };
  struct Named {
    const void* key;
    char* memory;
    size_t bytes;
    Place place;
  };

  static bool inside(const void* p, size_t bytes, const char* memory, size_t size) {
    const size_t offset = size_t(static_cast<const char*>(p) - memory);
    return memory != nullptr && offset < size && bytes <= size - offset;
  }
  static char* fresh(size_t bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, 128, bytes) != 0) fail("no memory for %zu bytes of shared memory", bytes);
    memset(p, kPoison, bytes);
    return static_cast<char*>(p);
  }
  static void drop(char* memory, size_t bytes) {
    asan::unpoison(memory, bytes);
    free(memory);
  }

  static void vanish(char* memory, size_t bytes) {
    tsan::write(memory, bytes);
    if (!kAsan) memset(memory, kPoison, bytes);
    asan::poison(memory, bytes);
  }

  static bool written(const char* p, size_t bytes) {
    if (bytes == 0) return false;
    return static_cast<unsigned char>(*p) != kPoison || memcmp(p, p + 1, bytes - 1) != 0;  // each byte is as the next
  }

  char* dynamic_ = nullptr;
  size_t bytes_ = 0;
  std::vector<Cut> cuts_;
  std::vector<Named> named_;
};

}  // namespace host
}  // namespace mtmlk
