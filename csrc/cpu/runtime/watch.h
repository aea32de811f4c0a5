// Whether a call is to end early. A call makes a Watch; its threads look at it between pieces of work (MTMLK_INLINE
// stops() in stops.h), and what is left is then skipped. Only the thread that called may ask its caller about it.
#pragma once

#include <pthread.h>
#include <stdint.h>

namespace mtmlk {

// In cache lines of its own: all threads read it, and its neighbours on a stack are written.
struct alignas(128) Watch {
  int32_t stopped;  // atomic
  int32_t asks;     // whether there is somebody to ask
  pthread_t caller;
  int64_t next;  // ms, the caller's: when it asks again
};

Watch start_watch();

// In the calling thread, and where it is time: asks. Returns whether the call has been stopped.
bool ask_caller(Watch* watch);

}  // namespace mtmlk
