// device_api.h's words, on the CPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cuda/host/builtins.h"
#include "cuda/host/mma.h"

#define DEV inline

#define SHARED_ARRAY(type, name, n)           \
  static char name##_key;                     \
  auto& name = *reinterpret_cast<type(*)[n]>( \
      ::mtmlk::host::named_shared(&name##_key, sizeof(type) * (n), ::mtmlk::host::here()))

namespace mtmlk {
namespace host {

inline char* named_shared(const void* key, size_t bytes, Place place) {
  tsan::Quiet quiet;
  return self().block->shared.named(key, bytes, place);
}

inline void check_copy(const void* shared, const void* global, size_t bytes, Place place) {
  tsan::Quiet quiet;
  if (((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) & (bytes - 1)) != 0)
    fault(place, "copy_async: an address that is no multiple of %zu", bytes);
  if (!self().block->shared.holds(shared, bytes))
    fault(place, "copy_async: the target is not in this block's shared memory");
}

}  // namespace host

template <class T>
T kept(T x) {
  return x;
}

inline char* dynamic_shared() { return host::self().block->shared.dynamic(); }

inline int cluster_rank() { return host::self().block->rank; }
inline void cluster_sync(host::Place place = host::here()) {
  host::tsan::Quiet quiet;
  host::Engine& engine = *host::self().engine;
  engine.meet(engine.cluster(), place);
}
template <class T>
T* peer_shared(T* p, int rank, host::Place place = host::here()) {
  host::tsan::Quiet quiet;
  host::Engine& engine = *host::self().engine;
  if (rank < 0 || rank >= engine.shape().cluster) host::fault(place, "peer_shared: no block %d in the cluster", rank);
  if (engine.peer(rank).alive == 0) host::fault(place, "peer_shared: block %d of the cluster has returned", rank);
  char* there = engine.peer(rank).shared.same_place(host::self().block->shared, p);
  if (there == nullptr) host::fault(place, "peer_shared: not an address in this block's shared memory");
  return reinterpret_cast<T*>(there);
}

inline void wait_for_earlier_launches() { host::self().engine->wait_for_earlier(); }
inline void let_next_launch_begin() {}  // one that overlaps is as early as it can be

inline void copy_async_16(void* shared, const void* global, host::Place place = host::here()) {
  host::check_copy(shared, global, 16, place);
  host::self().copies.add(shared, global, 16);
}
template <class T>
void copy_async_one(T* shared, const T* global, host::Place place = host::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "one number");
  host::check_copy(shared, global, sizeof(T), place);
  host::self().copies.add(shared, global, sizeof(T));
}
inline void copy_async_commit() { host::self().copies.commit(); }
template <int kPending>
void copy_async_wait() {
  host::self().copies.wait(kPending);
}
inline void copy_async_wait_all() { host::self().copies.wait_all(); }

}  // namespace mtmlk
