// A thread's sleep until a word has changed.
#pragma once

#include <stdint.h>

#include <atomic>

namespace mtmlk {

// Sleeps while word == seen, until somebody calls wake(); sometimes for less, and for `ms` at most (< 0: no limit).
void sleep_while(const std::atomic<uint32_t>& word, uint32_t seen, int ms);
void wake(const std::atomic<uint32_t>& word, int sleepers);

}  // namespace mtmlk
