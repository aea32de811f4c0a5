// Head losses cut into units: what the calls with and without linear layers share.
#pragma once

#include <stddef.h>

#include <vector>

#include "isa/dispatch.h"

namespace mtmlk {

// The units of one or more heads, their norms and their losses. Heads are looked at again in `add_losses`, which may
// see a block of the rows that `prepare` saw.
class HeadUnits {
 public:
  HeadUnits(const MtmlkHead* heads, int64_t n, int32_t dtype, int threads, Watch* watch);

  int prepare(MtmlkHeadError* error);  // checks labels, sums norms
  int add_losses(const MtmlkHead* heads);
  void put_losses(void* losses) const;

 private:
  HeadCall call(const MtmlkHead* heads, std::vector<HeadUnit>& units) const;

  const MtmlkHead* heads_;
  int64_t n_;
  bool f32_;
  int threads_;
  Watch* watch_;
  std::vector<double> inverse_, sums_;
};

class Workspace {
 public:
  Workspace(int64_t bytes, Watch* watch) : data_(acquire_workspace(bytes, watch)), watch_(watch) {}
  ~Workspace() {
    if (data_) release_workspace(data_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }
  int status() const { return data_ ? MTMLK_OK : watch_->stopped ? MTMLK_STOPPED : MTMLK_OUT_OF_MEMORY; }

 private:
  void* data_;
  Watch* watch_;
};

}  // namespace mtmlk
