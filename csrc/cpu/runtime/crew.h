// The threads of one call, and the memory of each.
#pragma once

#include <stdint.h>

#include "runtime/team.h"
#include "runtime/watch.h"

namespace mtmlk {

struct Crew {
  int threads;
  Watch* watch;  // nullptr: too short to be stopped
  char* scratch;
  int64_t thread_bytes;
};

namespace {

template <class T>
T* own_scratch(const Crew& crew, int slot) {
  return reinterpret_cast<T*>(crew.scratch + slot * crew.thread_bytes);
}

template <class Body>
void share(const Crew& crew, int64_t n, const Body& body) {
  each_piece(crew.threads, n, crew.watch, body);
}

}  // namespace
}  // namespace mtmlk
