// Memory of a call, cut from its workspace.
#pragma once

#include <stdint.h>

#include "mtml/sizes.h"

namespace mtmlk {
namespace {

// Aligned pieces of one allocation; with a null base it only counts.
struct Carver {
  char* base;
  int64_t used;
  template <class T>
  T* take(int64_t n) {
    char* p = base ? base + used : nullptr;
    used += round_up(n * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(p);
  }
};

}  // namespace
}  // namespace mtmlk
