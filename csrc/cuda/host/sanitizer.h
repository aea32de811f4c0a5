// What sanitizers must be told about fibers and shared memory; without a sanitizer all of it is empty.
//
// ThreadSanitizer takes each fiber for a thread, and switches order nothing: only what publish() and receive() say does.
#pragma once

#include <stddef.h>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MTMLK_TSAN 1
#endif
#if __has_feature(address_sanitizer)
#define MTMLK_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define MTMLK_TSAN 1
#endif
#if defined(__SANITIZE_ADDRESS__)
#define MTMLK_ASAN 1
#endif

#if defined(MTMLK_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_release(void* address);
void __tsan_write_range(void* address, unsigned long bytes);
void __tsan_read_range(void* address, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#if defined(MTMLK_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Functions between fibers, whose accesses belong to none.
#define MTMLK_UNWATCHED __attribute__((no_sanitize_thread))

namespace mtmlk {
namespace host {

#if defined(MTMLK_TSAN)
constexpr bool kTsan = true;
#else
constexpr bool kTsan = false;
#endif
#if defined(MTMLK_ASAN)
constexpr bool kAsan = true;
#else
constexpr bool kAsan = false;
#endif

namespace tsan {

#if defined(MTMLK_TSAN)
// While one lives, its fiber's accesses are the emulator's own: fibers share its state, but never run at once.
struct Quiet {
  Quiet() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Quiet() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
};

inline void* current() { return __tsan_get_current_fiber(); }
inline void* create(const char* name) {
  void* fiber = __tsan_create_fiber(0);
  __tsan_set_fiber_name(fiber, name);
  return fiber;
}
// As if the fiber `by` had created it.
MTMLK_UNWATCHED inline void* create_by(void* by, const char* name) {
  void* const own = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(by, 1);
  void* const fiber = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(own, 1);
  __tsan_set_fiber_name(fiber, name);
  return fiber;
}
inline void destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void enter(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }  // 1: the switch orders nothing

// What came before a publish() comes before what follows a receive(). The first of a meeting forgets earlier meetings.
inline void publish(char* order, bool first) {
  if (first)
    __atomic_store_n(order, 1, __ATOMIC_RELEASE);
  else
    __atomic_fetch_add(order, 1, __ATOMIC_RELEASE);
}
inline void receive(char* order) { (void)__atomic_load_n(order, __ATOMIC_ACQUIRE); }
inline void publish_more(char* order) { __tsan_release(order); }
inline void read(const void* p, size_t bytes) { __tsan_read_range(const_cast<void*>(p), bytes); }
// A write that counts, though a Quiet lives.
inline void write(void* p, size_t bytes) {
  AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0);
  __tsan_write_range(p, bytes);
  AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0);
}
#else
struct Quiet {
  Quiet() {}
};
inline void* current() { return nullptr; }
inline void* create(const char*) { return nullptr; }
inline void* create_by(void*, const char*) { return nullptr; }
inline void destroy(void*) {}
inline void enter(void*) {}
inline void publish(char*, bool) {}
inline void receive(char*) {}
inline void publish_more(char*) {}
inline void read(const void*, size_t) {}
inline void write(void*, size_t) {}
#endif

}  // namespace tsan

namespace asan {

#if defined(MTMLK_ASAN)
// Around each switch of stacks; `fake` is where the fiber that leaves keeps its stack of returned frames, nullptr when
// it will not come back.
inline void leave(void** fake, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(fake, bottom, bytes);
}
inline void arrive(void* fake, const void** bottom, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake, bottom, bytes);
}
inline void poison(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
inline void leave(void**, const void*, size_t) {}
inline void arrive(void*, const void**, size_t*) {}
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
#endif

}  // namespace asan
}  // namespace host
}  // namespace mtmlk
