// A kernel that a program in another language calls.
#include "cuda/launch.h"
#include "mtml/abi.h"

using namespace mtmlk;

// y[i] = x[i - 1] + x[i], of n in a circle
__global__ void add_neighbours(const float* x, float* y, int n) {
  SharedCarver at(dynamic_shared());
  float* values = at.take<float>(size_t(n));
  const int i = int(threadIdx.x);
  values[i] = x[i];
  __syncthreads();
  y[i] = values[(i + n - 1) % n] + values[i];
}

extern "C" MTMLK_API int add_neighbours_in_order(const float* x, float* y, int n, int order) {
#if !defined(__CUDACC__)
  host::set_order(order);
#endif
  SharedCarver count;
  count.take<float>(size_t(n));
  return start(add_neighbours, {1, unsigned(n), count.bytes()}, x, y, n);
}
