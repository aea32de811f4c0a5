// Where threads meet.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cuda/host/fail.h"
#include "cuda/host/sanitizer.h"

namespace mtmlk {
namespace host {

// One use of a barrier. It may be used again when all who met have gone on, which `leaving` counts.
struct Meeting {
  Place place = {nullptr, 0};  // of the first to arrive
  uint32_t mask = 0;           // lanes that meet, where it is a warp's, and how many
  int lanes = 0;
  int arrived = 0, leaving = 0;
  char order = 0;
};

struct Thread;

// Of a block or a cluster. A fiber may reach the next meeting before others have left this one: there are two.
struct Barrier {
  Thread* members;
  int count;  // of members
  int alive;  // of them, those that have not returned from the kernel
  unsigned generation;
  Meeting meetings[2];

  Meeting& open() { return meetings[generation % 2]; }
};

inline bool same(const Place& a, const Place& b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

}  // namespace host
}  // namespace mtmlk
