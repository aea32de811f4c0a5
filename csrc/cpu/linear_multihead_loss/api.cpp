// The C ABI of the linear heads: blocks of rows, workspace, dispatch.
#include <vector>

#include "mtml/abi.h"
#include "mtml/losses.h"
#include "mtml/sizes.h"
#include "runtime/threads.h"
#include "runtime/watch.h"
#include "runtime/workspace.h"
#include "multihead_loss/units.h"
#include "linear_multihead_loss/call.h"
#include "isa/dispatch.h"

namespace mtmlk {
namespace {

constexpr int64_t kLogitBytes = int64_t(96) << 20;   // of one block of rows
constexpr int64_t kBlockRows = 384, kMultiple = 24;  // whole tiles of 6, 8 and 12 rows

int64_t stride(int32_t dtype, int64_t columns) { return round_up(columns, kernels_of(dtype).lanes); }

int64_t block_rows(int64_t ld, int64_t itemsize) {
  int64_t rows = kLogitBytes / (ld * itemsize) / kMultiple * kMultiple;
  if (rows > kBlockRows) rows = kBlockRows;
  return rows < kMultiple ? kMultiple : rows;
}

// A call's heads, whose logits and gradients lie in z, and what the kernels need besides.
class LinearRun {
 public:
  LinearRun(const MtmlkLinear& linear, int32_t dtype, int threads, int64_t most_rows, Watch* watch)
      : linear_(linear), kernels_(kernels_of(dtype)), itemsize_(element_bytes(dtype)), starts_(1, 0) {
    for (int64_t h = 0; h < linear.n_heads; ++h) starts_.push_back(starts_.back() + linear.heads[h].classes);
    call_.linear = &linear_, call_.starts = starts_.data(), call_.ld = round_up(starts_.back(), kernels_.lanes);
    const double work = double(linear.rows) * double(linear.features * starts_.back());
    call_.threads = threads_for(work, threads), call_.watch = is_long(work) ? watch : nullptr;
    int64_t thread = 0, shared = 0;
    kernels_.linear_bytes(linear.features, most_rows, &thread, &shared);
    call_.thread_bytes = round_up(thread, 128);
    shared_ = round_up(shared, 128);
  }

  int64_t ld() const { return call_.ld; }
  int64_t bytes() const { return shared_ + call_.thread_bytes * call_.threads; }
  void use(void* workspace) {
    call_.shared = workspace;
    call_.scratch = static_cast<char*>(workspace) + shared_;
  }
  void at(int64_t row0, int64_t rows, void* z) { call_.row0 = row0, call_.rows = rows, call_.z = z; }

  void logits() {
    if (starts_.back()) kernels_.linear_logits(call_);
  }

  // The heads of the rows that z holds.
  std::vector<MtmlkHead> heads(bool gradient) const {
    std::vector<MtmlkHead> found;
    for (int64_t h = 0; h < linear_.n_heads; ++h) {
      MtmlkHead head = linear_.heads[h];
      const int64_t target = head.ids ? 8 : target_values(head.kind, head.classes) * itemsize_;
      head.rows = call_.rows, head.ld = call_.ld;
      head.logits = static_cast<char*>(call_.z) + starts_[size_t(h)] * itemsize_;
      head.gradient = gradient ? const_cast<void*>(head.logits) : nullptr;
      head.target = static_cast<const char*>(head.target) + call_.row0 * target;
      if (head.sample_weights)
        head.sample_weights = static_cast<const char*>(head.sample_weights) + call_.row0 * itemsize_;
      found.push_back(head);
    }
    return found;
  }

  void gradients(const double* by, void* dx, void* const* dw, void* const* db, bool add) {
    call_.by = by, call_.dx = dx, call_.dw = dw, call_.db = db, call_.add = add;
    if (dx) kernels_.linear_features(call_);
    bool any = false;
    for (int64_t h = 0; h < linear_.n_heads; ++h) any |= dw[h] || db[h];
    if (any && starts_.back()) kernels_.linear_weights(call_);
  }

 private:
  MtmlkLinear linear_;
  const TypedKernels& kernels_;
  int64_t itemsize_, shared_ = 0;
  std::vector<int64_t> starts_;
  LinearMultiheadCall call_ = {};
};

}  // namespace
}  // namespace mtmlk

using namespace mtmlk;

extern "C" {

int64_t mtmlk_linear_stride(int32_t dtype, int64_t columns) { return stride(dtype, columns); }

int mtmlk_linear_keep(const MtmlkLinear* linear, int32_t dtype, int32_t threads, void* losses, void* kept,
                      MtmlkHeadError* error) {
  Watch watch = start_watch();
  MultiheadUnits units(linear->heads, linear->n_heads, dtype, threads, &watch);
  int status = units.prepare(error);
  if (status != MTMLK_OK) return status;
  LinearRun run(*linear, dtype, threads, 0, &watch);
  const Workspace workspace(run.bytes(), &watch);
  if (!workspace.data()) return workspace.status();
  run.use(workspace.data());
  run.at(0, linear->rows, kept);
  run.logits();
  status = watch.stopped ? MTMLK_STOPPED : units.add_losses(run.heads(true).data());
  if (status == MTMLK_OK) units.put_losses(losses);
  return status;
}

int mtmlk_linear_back(const MtmlkLinear* linear, int32_t dtype, int32_t threads, const void* kept,
                      const double* cotangents, void* dx, void* const* dw, void* const* db) {
  Watch watch = start_watch();
  LinearRun run(*linear, dtype, threads, linear->rows, &watch);
  const Workspace workspace(run.bytes(), &watch);
  if (!workspace.data()) return workspace.status();
  run.use(workspace.data());
  run.at(0, linear->rows, const_cast<void*>(kept));
  run.gradients(cotangents, dx, dw, db, false);
  return watch.stopped ? MTMLK_STOPPED : MTMLK_OK;
}

int mtmlk_linear_blocks(const MtmlkLinear* linear, int32_t dtype, int32_t threads, void* losses, void* dx,
                        void* const* dw, void* const* db, MtmlkHeadError* error) {
  const std::vector<double> ones(size_t(linear->n_heads), 1.0);
  Watch watch = start_watch();
  MultiheadUnits units(linear->heads, linear->n_heads, dtype, threads, &watch);
  int status = units.prepare(error);
  if (status != MTMLK_OK) return status;
  bool gradient = dx;
  for (int64_t h = 0; h < linear->n_heads; ++h) gradient |= dw[h] || db[h];
  const int64_t itemsize = element_bytes(dtype);
  LinearRun run(*linear, dtype, threads, kBlockRows, &watch);
  const int64_t most = block_rows(run.ld() ? run.ld() : 1, itemsize), rows = most < linear->rows ? most : linear->rows;
  const int64_t z_bytes = round_up(rows * run.ld() * itemsize, 128);
  const Workspace workspace(z_bytes + run.bytes(), &watch);
  if (!workspace.data()) return workspace.status();
  run.use(static_cast<char*>(workspace.data()) + z_bytes);
  for (int64_t row = 0; row < linear->rows && status == MTMLK_OK; row += rows) {
    run.at(row, linear->rows - row < rows ? linear->rows - row : rows, workspace.data());
    run.logits();
    status = watch.stopped ? MTMLK_STOPPED : units.add_losses(run.heads(gradient).data());
    if (status == MTMLK_OK && gradient) run.gradients(ones.data(), dx, dw, db, row > 0);
    if (watch.stopped) status = MTMLK_STOPPED;
  }
  if (status == MTMLK_OK) units.put_losses(losses);
  return status;
}

}  // extern "C"
