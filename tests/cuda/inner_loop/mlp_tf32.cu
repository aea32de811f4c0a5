// The perceptrons' kernels on matrix units for a library on the CPU, and how they round.
#include "cuda/inner_loop/mlp/in_tf32.cu"

extern "C" {

MTMLK_API float rounded_to_tf32(float x) { return mtmlk::rounded_to_tf32(x); }
MTMLK_API float rounded_by_the_unit(float x) {
  const uint32_t bits = mtmlk::to_tf32(x);
  memcpy(&x, &bits, sizeof x);
  return x;
}
}
