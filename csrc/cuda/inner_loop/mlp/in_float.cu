// The perceptrons' kernels in float, and their entry: checks, then the launch. In double the interpreter runs them.
#include "cuda/inner_loop/mlp/launches.cuh"
#include "cuda/status.h"

namespace mtmlk {
namespace {

bool is_sound(const MtmlkMlpLaunch& l, MtmlkReason* reason) {
  if (l.dtype == MTMLK_F32 && l.blocks > 0 && l.threads >= 32 && l.threads <= 256 && l.threads % 32 == 0) return true;
  snprintf(reason->text, sizeof reason->text,
           "run_mlp: expected float32, blocks and 32 to 256 threads in warps, got dtype %d, %d and %d", int(l.dtype),
           int(l.blocks), int(l.threads));
  return false;
}

}  // namespace
}  // namespace mtmlk

extern "C" {

int mtmlk_mlp_shape(int32_t index, MtmlkMlpShape* shape) {
  return mtmlk::with_mlp(index, mtmlk::Mlps{}, 0, [&](auto listed) {
    using Listed = decltype(listed);
    using S = typename Listed::S;
    *shape = {};
    shape->layers = S::kLayers, shape->bent = S::kBent;
    for (int l = 0; l <= S::kLayers; ++l) shape->widths[l] = S::width(l);
    for (int i = 0; i < 2; ++i) shape->rows[i] = Listed::kRows[i];
    return 1;
  });
}

int64_t mtmlk_mlp_shared_bytes(int32_t shape, const MtmlkMlpCall* call) {
  return mtmlk::mlp_shared_bytes<float>(shape, *call);
}

int64_t mtmlk_mlp_record(int32_t shape, const MtmlkMlpCall* call) { return mtmlk::mlp_record(shape, *call); }

int mtmlk_run_mlp(const MtmlkMlpLaunch* launch, const MtmlkMlpCall* call, void* stream, MtmlkReason* reason) {
  if (call->tasks == 0) return MTMLK_CUDA_OK;
  if (!mtmlk::is_sound(*launch, reason)) return MTMLK_CUDA_FAILED;
  return mtmlk::status_of(mtmlk::run_mlp<float>(*launch, *call, static_cast<mtmlk::Stream>(stream)), reason);
}
}
