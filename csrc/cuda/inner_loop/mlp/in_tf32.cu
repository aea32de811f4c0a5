// The perceptrons' kernels on matrix units, and their entry: checks, then the launch.
#include "cuda/inner_loop/mlp/tf32_list.cuh"
#include "cuda/inner_loop/mlp/tile_launches.cuh"
#include "cuda/status.h"

namespace mtmlk {
namespace {

constexpr int kNoSuchMlp = 1;  // cudaErrorInvalidValue

bool are_warps(int threads) { return threads >= 32 && threads <= 256 && threads % 32 == 0; }

bool is_sound(const MtmlkMlpLaunch& l, MtmlkReason* reason) {
  if (l.dtype == MTMLK_F32 && l.blocks > 0 && are_warps(l.threads) && are_warps(l.back_threads)) return true;
  snprintf(reason->text, sizeof reason->text,
           "run_tf32_mlp: expected float32, blocks and 32 to 256 threads in warps, got dtype %d, %d, %d and %d",
           int(l.dtype), int(l.blocks), int(l.threads), int(l.back_threads));
  return false;
}

int run(const MtmlkMlpLaunch& l, const MtmlkMlpCall& call, Stream stream) {
  Launch launch;
  launch.block = dim3(unsigned(l.threads)), launch.stream = stream;
  return with_mlp(l.shape, Tf32Mlps{}, kNoSuchMlp, [&](auto listed) {
    return TileLaunches<float, decltype(listed)>{call, launch, l.blocks, l.back_threads, l.overlaps != 0}.run();
  });
}

}  // namespace
}  // namespace mtmlk

extern "C" {

int mtmlk_tf32_mlp_shape(int32_t index, MtmlkMlpShape* shape) {
  return mtmlk::with_mlp(index, mtmlk::Tf32Mlps{}, 0, [&](auto listed) {
    using Listed = decltype(listed);
    using S = typename Listed::S;
    *shape = {};
    shape->layers = S::kLayers, shape->bent = S::kBent;
    for (int l = 0; l <= S::kLayers; ++l) shape->widths[l] = S::width(l);
    for (int i = 0; i < 2; ++i) shape->rows[i] = Listed::kRows[i];
    shape->tile = Listed::kTile, shape->terms = S::kTerms;
    return 1;
  });
}

int64_t mtmlk_tf32_mlp_shared_bytes(int32_t shape, const MtmlkMlpCall* call) {
  return mtmlk::with_mlp(shape, mtmlk::Tf32Mlps{}, int64_t(0), [&](auto listed) {
    return int64_t(mtmlk::TileLaunches<float, decltype(listed)>::shared_bytes(*call, mtmlk::goes_back(*call)));
  });
}

int64_t mtmlk_tf32_mlp_record(int32_t shape, const MtmlkMlpCall* call) {
  return mtmlk::with_mlp(shape, mtmlk::Tf32Mlps{}, int64_t(0),
                         [&](auto listed) { return mtmlk::TileLaunches<float, decltype(listed)>::space(*call); });
}

int mtmlk_run_tf32_mlp(const MtmlkMlpLaunch* launch, const MtmlkMlpCall* call, void* stream, MtmlkReason* reason) {
  if (call->tasks == 0) return MTMLK_CUDA_OK;
  if (!mtmlk::is_sound(*launch, reason)) return MTMLK_CUDA_FAILED;
  return mtmlk::status_of(mtmlk::run(*launch, *call, static_cast<mtmlk::Stream>(stream)), reason);
}
}
