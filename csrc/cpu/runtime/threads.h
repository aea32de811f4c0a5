// How many threads a call may use.
#pragma once

namespace mtmlk {

int usable_threads(int threads);  // 1 in a forked child, which has none of its parent's threads

}  // namespace mtmlk
