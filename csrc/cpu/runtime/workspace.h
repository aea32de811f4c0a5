// A pool of large buffers: first-touch page faults cost 35 ms per 256 MB, so buffers are handed from call to call.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "runtime/watch.h"

namespace mtmlk {

void* acquire_workspace(int64_t bytes, Watch* watch);  // nullptr when memory is short, or the call is stopped meanwhile
void release_workspace(void* buffer);

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
