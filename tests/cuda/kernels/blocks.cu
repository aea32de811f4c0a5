// Threads of a block: __syncthreads, shared arrays, indices.
#include "case.h"

// y[i] = x[(i + 33) % n] through shared memory.
template <bool kSync>
__global__ void rotate(const float* x, float* y) {
  SHARED_ARRAY(float, tile, 128);
  const int i = int(threadIdx.x), n = int(blockDim.x);
  tile[i] = x[i];  // rotate: write
  if (kSync) __syncthreads();
  y[i] = tile[(i + 33) % n];  // rotate: read
}

template <bool kSync>
static void rotation() {
  Buffer<float> x(128), y(128);
  x.draw(1);
  launch(rotate<kSync>, {1, 128}, x.data(), y.data());
  report(y, [&](size_t i) { return x[(i + 33) % 128]; });
}

// sums[b] = sum_i x[b, i], i < n
__global__ void row_sums(const float* x, float* sums, int n) {
  SharedCarver at(dynamic_shared());
  float* partial = at.take<float>(blockDim.x / 32);  // [warps]
  float sum = 0;
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) sum += x[int(blockIdx.x) * n + i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < int(blockDim.x) / 32; ++w) sum += partial[w];
  sums[blockIdx.x] = sum;
}

static void reduction() {
  const int rows = 5, n = 333;
  Buffer<float> x(rows * n), sums(rows);
  x.draw(2, 1000);
  SharedCarver count;
  count.take<float>(3);
  launch(row_sums, {rows, 96, count.bytes()}, x.data(), sums.data(), n);
  report(sums, [&](size_t r) {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += x[r * n + size_t(i)];
    return sum;
  });
}

// Three arrays of odd sizes, filled by some threads and read by others.
__global__ void carve(double* y, int n) {
  SharedCarver at(dynamic_shared());
  float* a = at.take<float>(size_t(n));
  double* b = at.take<double>(size_t(n));
  char* c = at.take<char>(size_t(n));
  const int i = int(threadIdx.x);
  if (i < n) a[i] = float(i), b[i] = 2 * i, c[i] = char(3 * i);
  __syncthreads();
  const int j = n - 1 - i;
  if (i < n) y[i] = a[j] + b[j] + c[j];
}

static void carving() {
  const int n = 13;
  Buffer<double> y(n);
  SharedCarver count;
  count.take<float>(n), count.take<double>(n), count.take<char>(n);
  launch(carve, {1, 32, count.bytes()}, y.data(), n);
  report(y, [&](size_t i) { return 6.0 * double(n - 1 - int(i)); });
}

// y[block, thread] = their numbers, computed from three dimensions; threads from `n` on leave before the barrier.
__global__ void number(int* y, int n) {
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  if (int(thread) >= n) return;
  __syncthreads();
  y[block * unsigned(n) + thread] = int(block * 1000 + thread);
}

static void indices() {
  const int threads = 40;
  Buffer<int> y(2 * 2 * 2 * threads);
  launch(number, {dim3(2, 2, 2), dim3(3, 5, 4)}, y.data(), threads);
  report(y, [&](size_t i) { return i / threads * 1000 + i % threads; });
}

// counts[k] = how many x are k
__global__ void count_values(const int* x, int n, int* counts) {
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x))
    atomicAdd(&counts[x[i]], 1);
}

static void histogram() {
  const int n = 1000;
  Buffer<int> x(n), counts(8);
  x.draw(3, 8);
  for (size_t k = 0; k < 8; ++k) counts[k] = 0;
  launch(count_values, {4, 64}, x.data(), n, counts.data());
  report(counts, [&](size_t k) {
    int count = 0;
    for (size_t i = 0; i < n; ++i) count += x[i] == int(k);
    return count;
  });
}

// total = sum_b x[b], by the block that is done last, in the order of the blocks.
template <bool kFence>
__global__ void sum_of_blocks(const float* x, float* partial, unsigned* done, float* total) {
  if (threadIdx.x > 0) return;
  partial[blockIdx.x] = x[blockIdx.x];  // last block: write
  if (kFence) __threadfence();
  if (atomicAdd(done, 1u) + 1 < gridDim.x) return;
  if (kFence) __threadfence();
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];  // last block: read
  *total = sum;
}

template <bool kFence>
static void last_block() {
  const int blocks = 9;
  Buffer<float> x(blocks), partial(blocks), total(1);
  Buffer<unsigned> done(1);
  x.draw(12);
  done[0] = 0;
  launch(sum_of_blocks<kFence>, {blocks, 32}, x.data(), partial.data(), done.data(), total.data());
  report(total, [&](size_t) {
    float sum = 0;
    for (size_t b = 0; b < blocks; ++b) sum += x[b];
    return sum;
  });
}

// Every block writes y[0, 32): blocks are not ordered.
__global__ void overwrite(int* y) {
  y[threadIdx.x] = int(blockIdx.x);  // overwrite: write
}

static void blocks_race() {
  Buffer<int> y(32);
  launch(overwrite, {2, 32}, y.data());
  report(y, [](size_t) { return 1; });
}

__global__ void wait_for_all(int times) {
  for (int i = 0; i < times; ++i) __syncthreads();
}

// What one __syncthreads() of 128 threads costs the CPU.
static void barrier_time() {
  const int times = 20000;
  const clock_t before = clock();
  launch(wait_for_all, {1, 128}, int(times));
  printf("{\"microseconds\": %.3f}\n", double(clock() - before) / CLOCKS_PER_SEC / times * 1e6);
}
