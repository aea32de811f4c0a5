// The threads that share a call's work.
//
// The work is cut into pieces, and whoever runs takes the next one: the caller, which can finish all of them alone, and
// the threads of the team that come to help. So a call never waits for a thread that the system has not given a core,
// only for pieces that somebody has begun. What a piece computes never depends on who takes it.
#pragma once

#include <stdint.h>

#include "runtime/stops.h"
#include "runtime/watch.h"

namespace mtmlk {

using Pieces = void (*)(const void* body, int64_t first, int64_t last, int slot);

// pieces(body, first, last, slot) until every i < n has been in one [first, last). At most `threads` threads, at least
// 2, take part, each under a slot < threads of its own; the caller's is 0. The caller asks `watch` while it waits.
void run_on_team(int threads, int64_t n, Pieces pieces, const void* body, Watch* watch);

namespace {

// body(i, slot) for every i < n, less what is left when the call is stopped, by `threads` threads at most. From inside of
// a piece that threads share, they are as many more: whoever cuts there divides them.
template <class Body>
void each_piece(int threads, int64_t n, Watch* watch, const Body& body) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n && !stops(watch); ++i) body(i, 0);
    return;
  }
  const auto some = [&](int64_t first, int64_t last, int slot) {
    for (int64_t i = first; i < last && !stops(watch); ++i) body(i, slot);
  };
  const Pieces pieces = [](const void* given, int64_t first, int64_t last, int slot) {
    (*static_cast<decltype(&some)>(given))(first, last, slot);
  };
  run_on_team(threads, n, pieces, &some, watch);
}

}  // namespace
}  // namespace mtmlk
