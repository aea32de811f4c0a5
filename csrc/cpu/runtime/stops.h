// The look at a call's Watch.
//
// A piece of work that is skipped leaves its memory as it was, and what reads it computes with whatever is there: no
// value may decide where memory is read. Once one thread has seen the flag, so does every job that begins later.
#pragma once

#include "simd/simd.h"
#include "runtime/watch.h"

namespace mtmlk {
namespace {

// 2 ns, 8 in the calling thread. nullptr: work that is too short to be stopped.
MTMLK_INLINE bool stops(Watch* watch) {
  return watch && (__atomic_load_n(&watch->stopped, __ATOMIC_RELAXED) || ask_caller(watch));
}

}  // namespace
}  // namespace mtmlk
