// What the bindings of all ops share: addresses, the clock, and errors. Tensors come as addresses (tensor.data_ptr()),
// which mtml_kernels/native/tensors.py checks.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <time.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mtml/abi.h"

namespace mtmlk {

namespace py = pybind11;

using Address = uintptr_t;
using Addresses = std::vector<Address>;

inline double native_seconds = 0;        // spent inside the engine, under the GIL's protection
inline bool native_thread_time = false;  // of the calling thread's own time, which other work leaves alone

class Timed {
 public:
  Timed() : start_(now()) {}
  ~Timed() { native_seconds += now() - start_; }

 private:
  static double now() {
    timespec t;
    clock_gettime(native_thread_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }

  double start_;
};

struct BadLabel : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct BadId : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct NoLowRank : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What the caller passed is malformed; a ValueError in words.
struct Malformed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class T>
T* as(Address a) {
  return reinterpret_cast<T*>(a);
}

inline const void* const* list_in(const Addresses& a) {
  return a.empty() ? nullptr : reinterpret_cast<const void* const*>(a.data());
}
inline void* const* list_out(const Addresses& a) {
  return a.empty() ? nullptr : reinterpret_cast<void* const*>(a.data());
}

// The numbers of an error, as Python reads them from its text.
template <class... Numbers>
std::string spaced(Numbers... numbers) {
  std::string text;
  ((text += (text.empty() ? "" : " ") + std::to_string(numbers)), ...);
  return text;
}

// With the GIL: what a signal's handler has raised meanwhile.
inline void check_stopped(int status) {
  if (status == MTMLK_STOPPED) throw py::error_already_set();
}

// The end of a call of an inner loop, with the GIL.
inline void finish(int status, const MtmlkError& error) {
  if (status == MTMLK_OK) return;
  check_stopped(status);
  if (status == MTMLK_BAD_LABEL) throw BadLabel(spaced(error.is_query, error.task, error.sample, error.label));
  if (status == MTMLK_BAD_ID)
    throw BadId(spaced(error.is_query, error.input, error.task, error.sample, error.label, error.rows));
  if (status == MTMLK_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status == MTMLK_NO_LOW_RANK) throw NoLowRank("no weight of this program admits low-rank form");
  throw Malformed(error.what ? std::string(error.what) + ": expected what the call reads, got none"
                             : "status " + std::to_string(status));
}

// The end of a call of heads' losses, with the GIL.
inline void finish(int status, const MtmlkHeadError& error) {
  check_stopped(status);
  if (status == MTMLK_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status == MTMLK_BAD_LABEL) throw BadLabel(spaced(error.head, error.row, error.label));
}

// Each in the file of its name.
void bind_inner_loop(py::module_& m);
void bind_inner_loop_lane(py::module_& m);
void bind_mlp_lane(py::module_& m);              // behind it
void bind_inner_loop_plan_lane(py::module_& m);  // likewise, and behind bind_inner_loop
void bind_snapshot(py::module_& m);              // behind bind_inner_loop_lane
void bind_head_inner_loop(py::module_& m);
void bind_multihead_loss(py::module_& m);
void bind_linear_multihead_loss(py::module_& m);
void bind_task_linear(py::module_& m);
void bind_task_conv2d(py::module_& m);
void bind_task_update(py::module_& m);
void bind_cuda_device(py::module_& m);  // in builds with CUDA
void bind_cuda_inner_loop(py::module_& m);
void bind_cuda_mlp(py::module_& m);

}  // namespace mtmlk
