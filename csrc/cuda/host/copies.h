// Copies of a thread that are on their way (cp.async). The bytes arrive at their wait and not before; until then what
// they are to be written over is NaN, as nothing can be relied on there.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "cuda/host/sanitizer.h"

namespace mtmlk {
namespace host {

// Words that may be of any type. memcpy would become instructions that ThreadSanitizer does not see.
typedef uint32_t __attribute__((may_alias)) AnyWord;

class Copies {
 public:
  // bytes: a multiple of 4.
  void add(void* shared, const void* global, size_t bytes) {
    AnyWord* words = static_cast<AnyWord*>(shared);
    for (size_t i = 0; i < bytes / sizeof(AnyWord); ++i) words[i] = ~AnyWord(0);
    tsan::Quiet quiet;
    copies_.push_back({shared, global, bytes});
  }
  void commit() {
    tsan::Quiet quiet;
    groups_.push_back(copies_.size());
  }
  // Until at most `pending` groups, the newest, are on their way.
  void wait(size_t pending) { deliver(end_of_wait(pending)); }
  void wait_all() {
    deliver(all());
    clear();
  }
  // Those on their way may have read what they read already.
  void may_have_read() const {
    if (!kTsan) return;
    for (size_t i = delivered_; i < all(); ++i) tsan::read(at(i).global, at(i).bytes);
  }
  void clear() {
    tsan::Quiet quiet;
    copies_.clear(), groups_.clear();
    delivered_ = 0;
  }

 private:
  struct Copy {
    void* shared;
    const void* global;
    size_t bytes;

    void deliver() const {
      AnyWord* to = static_cast<AnyWord*>(shared);
      const AnyWord* from = static_cast<const AnyWord*>(global);
      for (size_t i = 0; i < bytes / sizeof(AnyWord); ++i) to[i] = from[i];
    }
  };

  Copy at(size_t i) const {
    tsan::Quiet quiet;
    return copies_[i];
  }
  size_t all() const {
    tsan::Quiet quiet;
    return copies_.size();
  }
  size_t end_of_wait(size_t pending) const {
    tsan::Quiet quiet;
    return groups_.size() > pending ? groups_[groups_.size() - pending - 1] : 0;
  }
  // The copies before `end`; the list is the emulator's, the bytes are the kernel's.
  void deliver(size_t end) {
    for (Copy c; next(end, c);) c.deliver();
  }
  bool next(size_t end, Copy& c) {
    tsan::Quiet quiet;
    if (delivered_ < end) {
      c = copies_[delivered_++];
      return true;
    }
    if (delivered_ == copies_.size()) copies_.clear(), groups_.clear(), delivered_ = 0;
    return false;
  }

  std::vector<Copy> copies_;    // oldest first
  std::vector<size_t> groups_;  // where each ends
  size_t delivered_ = 0;
};

}  // namespace host
}  // namespace mtmlk
