// Blocks of a cluster read each other's shared memory.
#include "case.h"

enum class Without { kNothing, kFirst, kLast };

// y[block, i] = x[next block of the cluster, i]
template <Without kWithout>
__global__ void from_next(const float* x, float* y, int blocks) {
  SharedCarver at(dynamic_shared());
  float* mine = at.take<float>(64);
  const int i = int(threadIdx.x), at_x = int(blockIdx.x) * 64 + i;
  const float* next = peer_shared(mine, (cluster_rank() + 1) % blocks);
  mine[i] = x[at_x];  // from_next: write
  if (kWithout != Without::kFirst) cluster_sync();
  y[at_x] = next[63 - i];  // from_next: read
  if (kWithout != Without::kLast) cluster_sync();
}

static void neighbours(void (*kernel)(const float*, float*, int)) {
  const int clusters = 2, blocks = 3;
  Buffer<float> x(clusters * blocks * 64), y(clusters * blocks * 64);
  x.draw(8);
  SharedCarver count;
  count.take<float>(64);
  launch(kernel, {clusters * blocks, 64, count.bytes(), blocks}, x.data(), y.data(), int(blocks));
  report(y, [&](size_t i) {
    const size_t block = i / 64, cluster = block / blocks;
    return x[(cluster * blocks + (block + 1) % blocks) * 64 + 63 - i % 64];
  });
}
static void clusters_right() { neighbours(from_next<Without::kNothing>); }
static void clusters_without_first() { neighbours(from_next<Without::kFirst>); }
static void clusters_without_last() { neighbours(from_next<Without::kLast>); }

// The same with arrays that have a name.
__global__ void named_from_next(int* y, int blocks) {
  SHARED_ARRAY(int, mine, 32);
  mine[threadIdx.x] = cluster_rank() * 100 + int(threadIdx.x);
  cluster_sync();
  y[blockIdx.x * 32 + threadIdx.x] = peer_shared(mine, (cluster_rank() + 1) % blocks)[threadIdx.x];
  cluster_sync();
}

static void clusters_named() {
  Buffer<int> y(64);
  launch(named_from_next, {2, 32, 0, 2}, y.data(), 2);
  report(y, [](size_t i) { return int(i < 32 ? 100 + i : i - 32); });
}
