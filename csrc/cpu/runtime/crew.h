// The threads of one call, and the memory of each.
#pragma once

#include <omp.h>
#include <stdint.h>

#include "runtime/watch.h"

namespace mtmlk {

struct Crew {
  int threads;
  Watch* watch;  // nullptr: too short to be stopped
  char* scratch;
  int64_t thread_bytes;
};

namespace {

// Of the thread that asks, inside of a parallel region or not.
template <class T>
T* own_scratch(const Crew& crew) {
  return reinterpret_cast<T*>(crew.scratch + (crew.threads > 1 ? omp_get_thread_num() : 0) * crew.thread_bytes);
}

}  // namespace
}  // namespace mtmlk
