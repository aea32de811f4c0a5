// How many threads a call is worth.
#pragma once

namespace mtmlk {

// Threads for `work` multiply-adds, of which every one has a share that is worth its start.
int threads_for(double work, int most);

// Whether a call takes so long that it looks whether it is to stop.
inline bool is_long(double work) { return work >= (1 << 18); }

}  // namespace mtmlk
