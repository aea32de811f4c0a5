// Class ids are checked before they index memory.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"

namespace mtmlk {

// Of [tasks, samples] ids; -100 is one that does not count. False: `error` says which is none of the classes.
inline bool labels_ok(const void* labels, int64_t tasks, int64_t samples, int64_t classes, bool query,
                      MtmlkError* error) {
  const int64_t* y = static_cast<const int64_t*>(labels);
  for (int64_t i = 0; y && i < tasks * samples; ++i)
    if ((y[i] < 0 && y[i] != -100) || y[i] >= classes) {
      *error = {MTMLK_BAD_LABEL, query, i / samples, i % samples, y[i], nullptr, 0, 0};
      return false;
    }
  return true;
}

}  // namespace mtmlk
