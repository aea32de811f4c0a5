// Arithmetic of sizes.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"

namespace mtmlk {

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static inline int64_t divide_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
static inline int64_t element_bytes(int32_t dtype) { return dtype == MTMLK_F32 ? 4 : 8; }

}  // namespace mtmlk
