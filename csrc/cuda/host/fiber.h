// A thread of execution that runs until it switches to another one. On x86-64 a switch takes a few nanoseconds.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cuda/host/sanitizer.h"

#if !defined(__x86_64__) || defined(MTMLK_HOST_UCONTEXT)
#define MTMLK_HOST_SWITCH_UCONTEXT 1
#include <ucontext.h>
#endif

namespace mtmlk {
namespace host {

#if defined(MTMLK_HOST_SWITCH_UCONTEXT)
using Context = ucontext_t;

inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }
inline void prepare_context(Context* context, char* bottom, size_t bytes, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = bottom, context->uc_stack.ss_size = bytes, context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#else
struct Context {
  void* stack_pointer;
};

// Saves the registers that a function keeps for its caller on the stack of `from`, takes those of `to` from its stack,
// and returns there.
__attribute__((naked, noinline)) inline void switch_context(Context* /* from: rdi */, Context* /* to: rsi */) {
  __asm__(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq (%rsi), %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\t"
      "ret");
}

// The stack as if `entry` had been about to begin when switch_context left it.
__attribute__((no_sanitize_address)) inline void prepare_context(Context* context, char* bottom, size_t bytes,
                                                                 void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(bottom + bytes) & ~uintptr_t(15));
  *--top = nullptr;  // where `entry` would return to, which it never does: aligns its stack
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context->stack_pointer = top;
}
#endif

struct Fiber {
  Context context;
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;
};

// A new run of the fiber: the last frames of the old one, which never returned, stand in nobody's way.
inline void forget_frames(const Fiber& fiber) {
  constexpr size_t kLast = 16 * 1024;
  asan::unpoison(static_cast<const char*>(fiber.bottom) + fiber.bytes - kLast, kLast);
}

// To be called first by what a fiber begins with, and after each switch back.
inline void arrived(Fiber& self, Fiber& from) { asan::arrive(self.fake, &from.bottom, &from.bytes); }

// Stops `from`, and goes on with `to`; `last`: for ever.
MTMLK_UNWATCHED inline void switch_fiber(Fiber& from, Fiber& to, bool last = false) {
  asan::leave(last ? nullptr : &from.fake, to.bottom, to.bytes);
  tsan::enter(to.tsan);
  switch_context(&from.context, &to.context);
}

}  // namespace host
}  // namespace mtmlk
