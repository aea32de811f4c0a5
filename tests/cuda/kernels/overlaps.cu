// Launches that begin before the one before them has ended.
#include "case.h"

// y[i] = 2 x[i]
__global__ void twice(const float* x, float* y) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  wait_for_earlier_launches();
  let_next_launch_begin();
  y[i] = 2 * x[i];  // twice: write
}

// z[i] = x[i] + y[n - 1 - i], of which no earlier launch writes x.
template <bool kWait>
__global__ void add_reversed(const float* x, const float* y, float* z) {
  const int n = int(gridDim.x * blockDim.x), i = int(blockIdx.x * blockDim.x + threadIdx.x);
  const float own = x[i];
  if (kWait) wait_for_earlier_launches();
  z[i] = own + y[n - 1 - i];  // add_reversed: read
}

// The same by a copy that is on its way when the thread waits.
__global__ void add_copied(const float* x, const float* y, float* z) {
  SHARED_ARRAY(float, copied, 64);
  const int n = int(gridDim.x * blockDim.x), i = int(blockIdx.x * blockDim.x + threadIdx.x);
  copy_async_one(copied + threadIdx.x, y + n - 1 - i);
  wait_for_earlier_launches();  // add_copied: wait
  copy_async_wait_all();
  z[i] = x[i] + copied[threadIdx.x];
}

static void overlaps(void (*kernel)(const float*, const float*, float*)) {
  const size_t n = 3 * 64;
  Buffer<float> x(n), y(n), z(n), sum(n);
  x.draw(12);
  Launch first{3, 64}, next{3, 64};
  next.overlaps = true;
  if (start(twice, first, x.data(), y.data()) != 0) printf("error\n");
  if (start(twice, next, y.data(), z.data()) != 0) printf("error\n");
  launch(kernel, next, x.data(), z.data(), sum.data());
  report(sum, [&](size_t i) { return x[i] + 4 * x[n - 1 - i]; });
}
static void overlaps_right() { overlaps(add_reversed<true>); }
static void overlaps_without_wait() { overlaps(add_reversed<false>); }
static void overlaps_copied_early() { overlaps(add_copied); }
