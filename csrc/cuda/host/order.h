// Which of the threads that could run does: 0 the first, 1 the last, from 2 on one drawn at random from that seed.
//
// A thread runs until it must wait, and a warp as far as it can: with 0 the first warp is far ahead of the last.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include "cuda/host/fail.h"

namespace mtmlk {
namespace host {

constexpr int kFromEnvironment = -1;

inline int& own_order() {
  static thread_local int order = kFromEnvironment;
  return order;
}
// For the launches of this thread; kFromEnvironment: what MTML_HOST_ORDER says, else 0.
inline void set_order(int order) { own_order() = order; }

class Order {
 public:
  static Order current() {
    if (own_order() != kFromEnvironment) return Order(own_order());
    const char* text = getenv("MTML_HOST_ORDER");
    if (text == nullptr || *text == '\0') return Order(0);
    char* end;
    const long order = strtol(text, &end, 10);
    if (*end != '\0' || order < 0 || order > 1000000) fail("MTML_HOST_ORDER: expected 0, 1, 2 ..., got %s", text);
    return Order(int(order));
  }

  bool ascends() const { return kind_ == 0; }
  bool draws() const { return kind_ > 1; }

  // A number below n.
  size_t draw(size_t n) {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return size_t((state_ >> 32) * n >> 32);
  }
  // The i-th of n clusters to run.
  size_t cluster(size_t i, size_t n) const {
    if (draws()) return (i + size_t(kind_)) % n;
    return ascends() ? i : n - 1 - i;
  }

 private:
  explicit Order(int kind) : kind_(kind), state_(uint64_t(kind) * 0x9E3779B97F4A7C15u + 1) {}

  int kind_;
  uint64_t state_;
};

}  // namespace host
}  // namespace mtmlk
