// See workspace.h.
#include "runtime/workspace.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <mutex>
#include <vector>

#include "mtml/abi.h"
#include "mtml/sizes.h"

namespace mtmlk {
namespace {

constexpr int64_t kHeader = 128;
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kKept = int64_t(256) << 20;  // bytes kept for later calls
constexpr int64_t kRecent = 32;                // releases for which a buffer stays whatever its size

struct Pool {
  std::mutex lock;
  std::vector<void*> idle;  // in the order of their release, each with its size and that release's number in the header
  int64_t idle_bytes = 0, releases = 0;
};

Pool& pool() {
  static Pool* instance = new Pool;  // never destroyed: calls may come from threads that outlive main
  return *instance;
}

// More than the machine has is refused: it would be given, and take the machine down as it is filled.
bool too_much(int64_t bytes) {
  static const double most = double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE));
  return bytes < 0 || double(bytes) > most;
}

int64_t& size_of(void* base) { return *static_cast<int64_t*>(base); }
int64_t& release_of(void* base) { return static_cast<int64_t*>(base)[1]; }

// Touches fresh memory page by page, which where a machine gives its pages slowly takes seconds (9 ms a MB have been
// seen). False: the call was stopped meanwhile.
bool clear(void* base, int64_t bytes, Watch* watch) {
  constexpr int64_t kPiece = 8 << 20;
  for (int64_t at = 0; at < bytes; at += kPiece) {
    if (at > 0 && ask_caller(watch)) return false;
    memset(static_cast<char*>(base) + at, 0, size_t(bytes - at < kPiece ? bytes - at : kPiece));
  }
  return true;
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)  // buffers of exactly their size, never used again: what is outside is noticed

void* acquire_workspace(int64_t bytes, Watch*) {
  if (too_much(bytes)) return nullptr;
  return aligned_alloc(64, size_t(round_up(bytes, 64)));
}

void release_workspace(void* buffer) { free(buffer); }

#else

void* acquire_workspace(int64_t bytes, Watch* watch) {
  if (too_much(bytes)) return nullptr;
  const int64_t needed = bytes + kHeader;
  Pool& p = pool();
  {
    const std::lock_guard<std::mutex> hold(p.lock);
    for (size_t i = p.idle.size(); i-- > 0;) {
      void* base = p.idle[i];
      if (size_of(base) < needed || size_of(base) > 4 * needed + kHugePage) continue;
      p.idle.erase(p.idle.begin() + int64_t(i));
      p.idle_bytes -= size_of(base);
      return static_cast<char*>(base) + kHeader;
    }
  }
  const int64_t unit = needed >= kHugePage ? kHugePage : 4096;
  const int64_t size = round_up(needed, unit);
  void* base = aligned_alloc(size_t(unit), size_t(size));
  if (!base) return nullptr;
#if defined(MADV_HUGEPAGE)
  if (unit == kHugePage) madvise(base, size_t(size), MADV_HUGEPAGE);
#endif
  if (!clear(base, size, watch)) {
    free(base);
    return nullptr;
  }
  size_of(base) = size;
  return static_cast<char*>(base) + kHeader;
}

void release_workspace(void* buffer) {
  void* base = static_cast<char*>(buffer) - kHeader;
  Pool& p = pool();
  std::vector<void*> surplus;
  {
    const std::lock_guard<std::mutex> hold(p.lock);
    p.idle.push_back(base);
    p.idle_bytes += size_of(base);
    release_of(base) = ++p.releases;
    // Beyond that only two stay, while they are in use: a step takes a large buffer and a small one in turn, and each
    // must find its own again (half a gigabyte of page faults were half of mini_conv's time).
    while (p.idle_bytes > kKept && (p.idle.size() > 2 || p.releases - release_of(p.idle.front()) >= kRecent)) {
      surplus.push_back(p.idle.front());
      p.idle_bytes -= size_of(p.idle.front());
      p.idle.erase(p.idle.begin());
    }
  }
  for (void* old : surplus) free(old);
}

#endif

}  // namespace mtmlk

extern "C" {

void* mtmlk_acquire(int64_t bytes) {
  mtmlk::Watch watch = mtmlk::start_watch();
  return mtmlk::acquire_workspace(bytes, &watch);
}
void mtmlk_release(void* memory) { mtmlk::release_workspace(memory); }

}  // extern "C"
