// Quotients as kernels compute them.
#include "cuda/inner_loop/machine.cuh"
#include "mtml/abi.h"

extern "C" MTMLK_API void quotients(int32_t d, int32_t magic, int32_t shift, const int32_t* n, int32_t count,
                                    int32_t* found) {
  const mtmlk::Divisor divisor = {d, uint32_t(magic), shift};
  for (int i = 0; i < count; ++i) found[i] = divisor.quotient(n[i]);
}
