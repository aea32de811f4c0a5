// A CUDA thread and the block that it belongs to.
#pragma once

#include <stdarg.h>
#include <stdint.h>

#include "cuda/host/barrier.h"
#include "cuda/host/copies.h"
#include "cuda/host/fail.h"
#include "cuda/host/fiber.h"
#include "cuda/host/sanitizer.h"
#include "cuda/host/shared.h"
#include "cuda/host/warp.h"
#include "cuda/host/words.h"

namespace mtmlk {
namespace host {

class Engine;

struct Block {
  dim3 index;
  int rank = 0;   // in its cluster
  int alive = 0;  // threads that have not returned
  char exits = 0;
  Barrier barrier;
  SharedMemory shared;
};

struct Thread {
  dim3 index;
  int lane = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  Engine* engine = nullptr;
  const Meeting* waits = nullptr;  // for it to be complete
  Copies copies;
  Fiber fiber;
};

inline thread_local Thread* running = nullptr;

inline Thread& self() { return *running; }

// A fault of the thread that runs, at a line of its kernel.
[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fault(Place place, const char* format, ...) {
  const Thread& t = self();
  const dim3 b = t.block->index;
  fprintf(stderr, "%s:%d: block (%u, %u, %u) thread (%u, %u, %u): ", place.file, place.line, b.x, b.y, b.z, t.index.x,
          t.index.y, t.index.z);
  va_list values;
  va_start(values, format);
  fail_with(format, values);
}

}  // namespace host
}  // namespace mtmlk
