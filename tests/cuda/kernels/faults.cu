// One broken rule each. Every case ends the process, or a sanitizer does.
#include "case.h"

__global__ void divergent_block() {
  if (threadIdx.x < 16)
    __syncthreads();  // divergent: first
  else
    __syncthreads();  // divergent: second
}
__global__ void divergent_warp() {
  if (threadIdx.x < 16)
    __syncwarp();  // divergent warp: first
  else
    __shfl_sync(0xffffffffu, 1, 0);  // divergent warp: second
}
__global__ void lost_block() {
  if (threadIdx.x <= 32)
    __syncthreads();  // lost: block
  else
    __syncwarp();  // lost: warp
}
__global__ void shuffle_outside(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0xffffu, 1, 20);  // outside
}
__global__ void lane_not_in_mask() {
  __syncwarp(0xffffu);  // not in mask
}
__global__ void lane_gone() {
  if (threadIdx.x == 7) return;
  __syncwarp();  // gone
}
__global__ void wrong_warp_size() {
  __syncwarp();  // no such lane
}
__global__ void overrun_carved(int n) {
  SharedCarver at(dynamic_shared());
  float* a = at.take<float>(10);  // carved: a
  float* b = at.take<float>(10);
  b[0] = a[0] = 1;
  a[n] = 1;  // overrun: carved
}
__global__ void overrun_end(int n) {
  reinterpret_cast<float*>(dynamic_shared())[n] = 1;  // overrun: end
}
__global__ void overrun_named(int n) {
  SHARED_ARRAY(float, a, 10);  // named: a
  float* first = a;
  first[n] = 1;  // overrun: named
}
__global__ void carve_too_much() {
  SharedCarver at(dynamic_shared());
  at.take<float>(100);  // too much
}
__global__ void carve_differently() {
  SharedCarver at(dynamic_shared());
  at.take<float>(threadIdx.x + 1);  // differently
}
__global__ void copy_misaligned(const float* x) {
  copy_async_16(dynamic_shared(), x + 1);  // misaligned
}
__global__ void copy_to_global(const float* x, float* y) {
  copy_async_16(y, x);  // not shared
}
__global__ void no_such_peer() {
  peer_shared(dynamic_shared(), 2);  // no such peer
}
__global__ void peer_gone() {
  if (cluster_rank() == 0) return;
  __syncthreads();
  peer_shared(dynamic_shared(), 0);  // peer gone
}

template <void (*kKernel)()>
static void broken() {
  launch(kKernel, {2, 64, 64, 2});
}
static void wrong_warp() { launch(wrong_warp_size, {1, 40}); }
static void shuffle_out() {
  Buffer<int> y(16);
  launch(shuffle_outside, {1, 32}, y.data());
}
static void overrun_between() { launch(overrun_carved, {1, 1, 96}, 12); }
static void overrun_past() { launch(overrun_end, {1, 1, 40}, 10); }
static void overrun_name() { launch(overrun_named, {1, 1}, 10); }
static void misaligned() {
  Buffer<float> x(8);
  launch(copy_misaligned, {1, 1, 64}, x.data());
}
static void not_shared() {
  Buffer<float> x(4), y(4);
  launch(copy_to_global, {1, 1}, x.data(), y.data());
}

// Launches that a device refuses as well; prints its codes.
static void refusals() {
  const Launch wrong[] = {{1, 32, 228 * 1024}, {1, 1025}, {0, 32}, {3, 32, 0, 2}, {16, 32, 0, 16}};
  for (const Launch& how : wrong) printf("%d\n", start(lane_not_in_mask, how));
}
