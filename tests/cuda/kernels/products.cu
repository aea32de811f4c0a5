// The matrix unit: C[16, 8] = A[16, K] B[K, 8].
#include "case.h"

constexpr int kDepth = 64;

DEV float value_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// x = high + low + what 3xTF32 leaves out
DEV void split(float x, uint32_t& high, uint32_t& low) {
  high = to_tf32(x);
  low = to_tf32(x - value_of(high));
}

template <bool kThree>
__global__ void product(const float* A, const float* B, float* C) {
  const int lane = int(threadIdx.x), group = lane / 4, within = lane % 4;
  float d[4] = {0, 0, 0, 0};
  for (int k = 0; k < kDepth; k += 8) {
    uint32_t a[4], a_low[4], b[2], b_low[2];
    for (int i = 0; i < 4; ++i) split(A[(group + 8 * (i % 2)) * kDepth + k + within + 4 * (i / 2)], a[i], a_low[i]);
    for (int i = 0; i < 2; ++i) split(B[(k + within + 4 * i) * 8 + group], b[i], b_low[i]);
    if (!kThree) {
      mma_tf32_16x8x8(d, a, b);
      continue;
    }
    float of_eight[4] = {};  // the unit cuts off sums, so they leave it before they grow
    mma_tf32_16x8x8(of_eight, a_low, b);
    mma_tf32_16x8x8(of_eight, a, b_low);
    mma_tf32_16x8x8(of_eight, a, b);
    for (int i = 0; i < 4; ++i) d[i] += of_eight[i];
  }
  for (int i = 0; i < 4; ++i) C[(group + 8 * (i / 2)) * 8 + 2 * within + i % 2] = d[i];
}

static void products(void (*kernel)(const float*, const float*, float*)) {
  Buffer<float> A(16 * kDepth), B(kDepth * 8), C(16 * 8);
  A.draw(9), B.draw(10);
  launch(kernel, {1, 32}, A.data(), B.data(), C.data());
  report(C, [&](size_t i) {
    double sum = 0;
    for (size_t k = 0; k < kDepth; ++k) sum += double(A[i / 8 * kDepth + k]) * B[k * 8 + i % 8];
    return sum;
  });
}
static void tf32() { products(product<false>); }
static void tf32_thrice() { products(product<true>); }
