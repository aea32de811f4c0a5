// The C ABI of the head losses: units, workspace, dispatch.
#include "multihead_loss/units.h"

#include "mtml/abi.h"
#include "mtml/losses.h"
#include "mtml/sizes.h"
#include "runtime/threads.h"
#include "runtime/watch.h"
#include "runtime/workspace.h"
#include "multihead_loss/call.h"
#include "isa/dispatch.h"

namespace mtmlk {
namespace {

constexpr int64_t kUnit = 1 << 15;  // elements; a multiple of every tile's columns
constexpr double kElement = 16;     // multiply-adds that take as long as an element: 1.5 ns

void cut(const MtmlkHead& h, int64_t index, std::vector<MultiheadUnit>& units) {
  const bool softmax = is_softmax(h.kind);
  const int64_t cols = target_values(h.kind, h.classes);
  if (h.rows == 0 || cols == 0) return;
  int64_t rows = kUnit / cols;
  if (softmax && h.inner == 1 && rows >= 64) rows = rows / 64 * 64;  // whole tiles
  if (softmax && h.inner > 1) rows = rows < 256 ? 256 : rows / 256 * 256;
  if (rows < 1) rows = 1;
  const int64_t step = softmax || cols <= kUnit ? cols : kUnit;
  for (int64_t r = 0; r < h.rows; r += rows)
    for (int64_t c = 0; c < cols; c += step) {
      const int64_t row1 = r + rows < h.rows ? r + rows : h.rows, col1 = c + step < cols ? c + step : cols;
      units.push_back({index, r, row1, c, col1, 0, 0, -1});
    }
}

double work_of(const MtmlkHead* heads, int64_t n) {
  int64_t elements = 0;
  for (int64_t i = 0; i < n; ++i) elements += heads[i].rows * heads[i].classes;
  return kElement * double(elements);
}

// Labels of heads without classes, which have no units.
bool labels_without_classes(const MtmlkHead& h, int64_t index, MtmlkHeadError* error) {
  const int64_t* y = static_cast<const int64_t*>(h.target);
  for (int64_t r = 0; h.ids && h.classes == 0 && r < h.rows; ++r)
    if (y[r] != h.ignore_index) {
      *error = {index, r, y[r]};
      return true;
    }
  return false;
}

}  // namespace

MultiheadUnits::MultiheadUnits(const MtmlkHead* heads, int64_t n, int32_t dtype, int threads, Watch* watch)
    : heads_(heads), n_(n), dtype_(dtype), threads_(threads), watch_(watch), inverse_(size_t(n)), sums_(size_t(n)) {}

MultiheadCall MultiheadUnits::call(const MtmlkHead* heads, std::vector<MultiheadUnit>& units) const {
  const double work = work_of(heads, n_);
  return {heads,
          units.data(),
          int64_t(units.size()),
          inverse_.data(),
          threads_for(work, threads_),
          is_long(work) ? watch_ : nullptr};
}

int MultiheadUnits::prepare(MtmlkHeadError* error) {
  std::vector<MultiheadUnit> units;
  for (int64_t i = 0; i < n_; ++i) {
    if (labels_without_classes(heads_[i], i, error)) return MTMLK_BAD_LABEL;
    cut(heads_[i], i, units);
  }
  kernels_of(dtype_).multihead_norms(call(heads_, units));
  if (watch_->stopped) return MTMLK_STOPPED;
  std::vector<double> norms(size_t(n_), 0.0);
  for (const MultiheadUnit& u : units) {
    if (u.bad >= 0) {
      *error = {u.head, u.bad, static_cast<const int64_t*>(heads_[u.head].target)[u.bad]};
      return MTMLK_BAD_LABEL;
    }
    norms[size_t(u.head)] += u.norm;
  }
  for (size_t i = 0; i < norms.size(); ++i) inverse_[i] = heads_[i].mean ? inverse_norm(norms[i]) : 1;
  return MTMLK_OK;
}

int MultiheadUnits::add_losses(const MtmlkHead* heads) {
  const TypedKernels& k = kernels_of(dtype_);
  std::vector<MultiheadUnit> units;
  int64_t scratch = 0;
  for (int64_t i = 0; i < n_; ++i) {
    cut(heads[i], i, units);
    const int64_t bytes = k.multihead_scratch(heads[i]);
    if (bytes > scratch) scratch = bytes;
  }
  scratch = round_up(scratch, 128);
  const MultiheadCall call = this->call(heads, units);
  const Workspace workspace(scratch * call.threads, watch_);
  if (!workspace.data()) return workspace.status();
  k.multihead_losses(call, workspace.data(), scratch);
  if (watch_->stopped) return MTMLK_STOPPED;
  for (const MultiheadUnit& u : units) sums_[size_t(u.head)] += u.loss;
  return MTMLK_OK;
}

void MultiheadUnits::put_losses(void* losses) const {
  for (size_t i = 0; i < sums_.size(); ++i) {
    const double loss = counts_nothing(inverse_[i]) ? 0 : sums_[i] * inverse_[i];
    if (dtype_ == MTMLK_F32)
      static_cast<float*>(losses)[i] = float(loss);
    else
      static_cast<double*>(losses)[i] = loss;
  }
}

}  // namespace mtmlk

using namespace mtmlk;

extern "C" {

int mtmlk_multihead_loss(const MtmlkHead* heads, int64_t n, int32_t dtype, int32_t threads, void* losses,
                         MtmlkHeadError* error) {
  Watch watch = start_watch();
  MultiheadUnits units(heads, n, dtype, threads, &watch);
  int status = units.prepare(error);
  if (status == MTMLK_OK) status = units.add_losses(heads);
  if (status == MTMLK_OK) units.put_losses(losses);
  return status;
}

}  // extern "C"
