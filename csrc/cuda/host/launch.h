// start() on the CPU: the kernel has ended when it returns. Refuses what a device refuses, with CUDA's codes.
#pragma once

#include <stddef.h>

#include <tuple>
#include <utility>

#include "cuda/host/run.h"

namespace mtmlk {

using Stream = void*;

namespace host {

constexpr int kInvalidValue = 1, kInvalidConfiguration = 9;  // cudaError_t
constexpr size_t kThreadsOfABlock = 1024;
constexpr int kBlocksOfACluster = 8;

inline int refusal(const Shape& s) {
  const size_t threads = size_t(s.block.x) * s.block.y * s.block.z, blocks = size_t(s.grid.x) * s.grid.y * s.grid.z;
  if (s.shared_bytes > kSharedLimit) return kInvalidValue;
  if (threads == 0 || threads > kThreadsOfABlock || blocks == 0) return kInvalidConfiguration;
  if (s.cluster < 1 || s.cluster > kBlocksOfACluster || s.grid.x % unsigned(s.cluster) != 0)
    return kInvalidConfiguration;
  return 0;
}

template <class... P>
struct Bound {
  void (*kernel)(P...);
  std::tuple<P...> arguments;

  static Bound copy(const void* bound) {
    tsan::Quiet
        quiet;  // the launcher's, who wrote it after earlier launches: no thread of a launch that overlaps knows that
    return *static_cast<const Bound*>(bound);
  }
  static void call(const void* bound) {
    const Bound own = copy(bound);
    std::apply(own.kernel, own.arguments);
  }
};

template <class... P, class... A>
int start(void (*kernel)(P...), const Shape& shape, A&&... arguments) {
  if (const int error = refusal(shape)) return error;
  const Bound<P...> bound = {kernel, std::tuple<P...>(std::forward<A>(arguments)...)};
  engine().run(shape, {Bound<P...>::call, &bound});
  return 0;
}

}  // namespace host
}  // namespace mtmlk
