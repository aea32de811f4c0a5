// See threads.h.
#include "runtime/threads.h"

#include <pthread.h>

namespace mtmlk {
namespace {

// A forked child inherits OpenMP's bookkeeping but not its threads: a parallel region of several threads would hang.
bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int usable_threads(int threads) {
  (void)registered;
  return forked || threads < 1 ? 1 : threads;
}

}  // namespace mtmlk
