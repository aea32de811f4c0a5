// Copies from global to shared memory that overlap with work.
#include "case.h"

enum class Fault { kNone, kNoWait, kEarlyCopy };

// y[i] = sum_k x[k, 4 (i % 32) + i / 32]: while one row of 128 is summed, the next is on its way.
template <Fault kFault>
__global__ void sum_rows(const float* x, float* y, int rows) {
  SharedCarver at(dynamic_shared());
  float* tiles[2] = {at.take<float>(128), at.take<float>(128)};
  const int i = int(threadIdx.x), from = 4 * i;
  float sum = 0;
  if (i < 32) copy_async_16(tiles[0] + from, x + from);
  copy_async_commit();
  for (int k = 0; k < rows; ++k) {
    if (i < 32 && k + 1 < rows) copy_async_16(tiles[(k + 1) % 2] + from, x + (k + 1) * 128 + from);  // early: copy
    copy_async_commit();
    if (kFault != Fault::kNoWait) copy_async_wait<1>();
    __syncthreads();
    sum += tiles[k % 2][i % 32 * 4 + i / 32];  // early: read
    if (kFault != Fault::kEarlyCopy) __syncthreads();
  }
  y[i] = sum;
}

static void pipeline(void (*kernel)(const float*, float*, int)) {
  const int rows = 7;
  Buffer<float> x(rows * 128), y(128);
  x.draw(6, 1000);
  SharedCarver count;
  count.take<float>(128), count.take<float>(128);
  launch(kernel, {1, 128, count.bytes()}, x.data(), y.data(), rows);
  report(y, [&](size_t i) {
    float sum = 0;
    for (size_t k = 0; k < rows; ++k) sum += x[k * 128 + i % 32 * 4 + i / 32];
    return sum;
  });
}
static void copies_right() { pipeline(sum_rows<Fault::kNone>); }
static void copies_without_wait() { pipeline(sum_rows<Fault::kNoWait>); }
static void copies_too_early() { pipeline(sum_rows<Fault::kEarlyCopy>); }

struct alignas(16) Four {
  float v[4];
};

// Both ways to wait for everything.
__global__ void copy_all(const float* x, float* y) {
  SHARED_ARRAY(Four, tile, 64);
  const int i = int(threadIdx.x);
  copy_async_16(tile[i].v, x + 4 * i);
  copy_async_wait_all();
  for (int k = 0; k < 4; ++k) y[4 * i + k] = tile[i].v[k];
  copy_async_16(tile[i].v, x + 4 * i);
  copy_async_commit();
  copy_async_wait<0>();
  for (int k = 0; k < 4; ++k) y[4 * i + k] += tile[i].v[k];
}

static void copies_at_once() {
  Buffer<float> x(256), y(256);
  x.draw(7);
  launch(copy_all, {1, 64}, x.data(), y.data());
  report(y, [&](size_t i) { return 2 * x[i]; });
}
