// Lanes of a warp.
#include "case.h"
#include "mtml/arithmetic.h"

// y[i] = x[i ^ 1] through shared memory.
template <bool kSync>
__global__ void swap_pairs(const float* x, float* y) {
  SHARED_ARRAY(float, tile, 64);
  const int i = int(threadIdx.x);
  tile[i] = x[i];  // swap_pairs: write
  if (kSync) __syncwarp();
  y[i] = tile[i ^ 1];  // swap_pairs: read
}

// The same, with a shuffle where the barrier belongs: it orders no accesses to memory.
__global__ void swap_pairs_by_shuffle(const float* x, float* y) {
  SHARED_ARRAY(float, tile, 64);
  const int i = int(threadIdx.x);
  tile[i] = x[i];  // by_shuffle: write
  const float zero = __shfl_sync(0xffffffffu, 0.0f, 0);
  y[i] = tile[i ^ 1] + zero;  // by_shuffle: read
}

static void pairs(void (*kernel)(const float*, float*)) {
  Buffer<float> x(64), y(64);
  x.draw(4);
  launch(kernel, {1, 64}, x.data(), y.data());
  report(y, [&](size_t i) { return x[i ^ 1]; });
}
static void pairs_right() { pairs(swap_pairs<true>); }
static void pairs_without_barrier() { pairs(swap_pairs<false>); }
static void pairs_by_shuffle() { pairs(swap_pairs_by_shuffle); }

// y[k, lane]: each kind of shuffle, in groups of 8 lanes and in halves of the warp.
__global__ void shuffle_all(const int* x, int* y) {
  const int lane = int(threadIdx.x), v = x[lane];
  const unsigned all = 0xffffffffu, half = lane < 16 ? 0xffffu : 0xffff0000u;
  y[lane] = __shfl_sync(all, v, 5);
  y[32 + lane] = __shfl_xor_sync(all, v, 3, 8);
  y[64 + lane] = __shfl_down_sync(all, v, 3u, 8);
  y[96 + lane] = __shfl_up_sync(all, v, 2u);
  y[128 + lane] = __shfl_sync(half, v, 7, 16);
  y[160 + lane] = int(__ballot_sync(half, v > 500));
  y[192 + lane] = int(__reduce_add_sync(half, unsigned(v)));
}

static int shuffled(Buffer<int>& x, int kind, int lane) {
  const int group = lane / 8 * 8, half = lane / 16 * 16;
  int bits = 0, sum = 0;
  for (int i = half; i < half + 16; ++i) {
    bits |= x[size_t(i)] > 500 ? int(1u << i) : 0;
    sum += x[size_t(i)];
  }
  const int source[] = {5, lane ^ 3, lane + 3 < group + 8 ? lane + 3 : lane, lane < 2 ? lane : lane - 2, half + 7};
  return kind == 5 ? bits : kind == 6 ? sum : x[size_t(source[kind])];
}

static void shuffles() {
  Buffer<int> x(32), y(7 * 32);
  x.draw(5, 1000);
  launch(shuffle_all, {1, 32}, x.data(), y.data());
  report(y, [&](size_t i) { return shuffled(x, int(i / 32), int(i % 32)); });
}

// Groups of 16, 8, 4 and 4 lanes: each turns its values by one lane, size / 2 times.
__global__ void turn_in_groups(int* y) {
  SHARED_ARRAY(int, values, 32);
  const int lane = int(threadIdx.x), size = lane < 16 ? 16 : lane < 24 ? 8 : 4, first = lane / size * size;
  const unsigned mask = ((1u << size) - 1) << first;
  int value = lane;
  for (int round = 0; round < size / 2; ++round) {
    values[lane] = value;
    __syncwarp(mask);
    value = values[first + (lane + 1) % size];
    __syncwarp(mask);
  }
  y[lane] = value;
}

static void groups() {
  Buffer<int> y(32);
  launch(turn_in_groups, {1, 32}, y.data());
  report(y, [](size_t i) {
    const int lane = int(i), size = lane < 16 ? 16 : lane < 24 ? 8 : 4;
    return lane / size * size + (lane + size / 2) % size;
  });
}

constexpr int kRounds = 40;

// The group of a lane in a round, of three.
MTMLK_ANYWHERE unsigned drawn_group(unsigned round, unsigned lane) {
  return ((round * 32 + lane + 1) * 2654435761u >> 20) % 3;
}

// In each round the lanes fall into other groups, which do not wait for each other: v <- 3 v + sum of the group's v, by
// way of shared memory and by way of a sum of registers.
__global__ void sum_in_drawn_groups(unsigned* y) {
  SHARED_ARRAY(unsigned, values, 32);
  const unsigned lane = threadIdx.x;
  unsigned v = lane + 1;
  for (unsigned round = 0; round < kRounds; ++round) {
    unsigned mask = 0, sum = 0;
    for (unsigned i = 0; i < 32; ++i)
      if (drawn_group(round, i) == drawn_group(round, lane)) mask |= 1u << i;
    values[lane] = v;
    __syncwarp(mask);
    for (unsigned i = 0; i < 32; ++i)
      if (mask >> i & 1) sum += values[i];
    if (__reduce_add_sync(mask, v) != sum) sum = 0;
    __syncwarp(mask);
    v = 3 * v + sum;
  }
  y[lane] = v;
}

static void drawn_groups() {
  Buffer<unsigned> y(32);
  launch(sum_in_drawn_groups, {1, 32}, y.data());
  unsigned v[32];
  for (unsigned lane = 0; lane < 32; ++lane) v[lane] = lane + 1;
  for (unsigned round = 0; round < kRounds; ++round) {
    unsigned sums[3] = {0, 0, 0};
    for (unsigned lane = 0; lane < 32; ++lane) sums[drawn_group(round, lane)] += v[lane];
    for (unsigned lane = 0; lane < 32; ++lane) v[lane] = 3 * v[lane] + sums[drawn_group(round, lane)];
  }
  report(y, [&](size_t i) { return v[i]; });
}
