// Products that are rounded where they stand, so that devices and hosts give the same bits.
#pragma once

#include "mtml/arithmetic.h"

namespace mtmlk {

// The rounded product, never the inside of a fused operation. Hosts compile with -ffp-contract=off.
MTMLK_ANYWHERE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
MTMLK_ANYWHERE double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace mtmlk
