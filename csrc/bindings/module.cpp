// The module mtml_kernels._C. This folder alone knows Python.
#include "bindings/tensors.h"

namespace mtmlk {
namespace {

// Asked now and then by a call that takes long, in its thread, without the GIL: runs the handlers of signals that have
// come meanwhile. One that raises ends the call; the exception then waits in the thread's state. Python runs handlers
// in its main thread only.
int32_t run_signal_handlers() {
  const PyGILState_STATE gil = PyGILState_Ensure();
  int32_t answer = PyErr_CheckSignals() == 0 ? MTMLK_GO_ON : MTMLK_STOP;
  try {
    if (answer == MTMLK_GO_ON) {
      const py::object main = py::module_::import("threading").attr("main_thread")().attr("ident");
      if (main.cast<unsigned long>() != PyThread_get_thread_ident()) answer = MTMLK_ASK_NO_MORE;
    }
  } catch (py::error_already_set& error) {
    error.restore();
    answer = MTMLK_STOP;
  }
  PyGILState_Release(gil);
  return answer;
}

// Recycled memory that Python's buffer protocol reads and writes.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes) {
    {
      const py::gil_scoped_release release;
      data_ = mtmlk_acquire(bytes);
    }
    if (PyErr_Occurred()) throw py::error_already_set();  // a signal's handler has raised meanwhile
    if (!data_) throw std::bad_alloc();
  }
  ~Memory() { mtmlk_release(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  py::buffer_info buffer() const {
    return py::buffer_info(static_cast<uint8_t*>(data_), static_cast<py::ssize_t>(bytes_));
  }

 private:
  void* data_;
  int64_t bytes_;
};

void bind_tensors(py::module_& m) {
  py::class_<PlainTensors>(m, "PlainTensors")
      .def(py::init<const py::capsule&, py::object, py::object, const py::object&>())
      .def("read", &PlainTensors::read)
      .def("addresses", &PlainTensors::addresses)
      .def("inner_loop", &PlainTensors::inner_loop)
      .def("divide", &PlainTensors::divide)
      .def("only_ones", &PlainTensors::only_ones);
  py::class_<Memory>(m, "Memory", py::buffer_protocol()).def(py::init<int64_t>()).def_buffer(&Memory::buffer);
}

}  // namespace
}  // namespace mtmlk

PYBIND11_MODULE(_C, m) {
  using namespace mtmlk;
  mtmlk_when_long(run_signal_handlers);
  m.doc() = "The compiled engine of mtml_kernels; use mtml_kernels.native.";
  py::register_exception<BadLabel>(m, "BadLabel", PyExc_ValueError);
  py::register_exception<BadId>(m, "BadId", PyExc_ValueError);
  py::register_exception<NoLowRank>(m, "NoLowRank", PyExc_ValueError);
  py::register_exception<Malformed>(m, "Malformed", PyExc_ValueError);
  bind_inner_loop(m);
  bind_inner_loop_lane(m);
  bind_mlp_lane(m);
  bind_inner_loop_plan_lane(m);
  bind_snapshot(m);
  bind_head_inner_loop(m);
  bind_multihead_loss(m);
  bind_linear_multihead_loss(m);
  bind_task_linear(m);
  bind_task_conv2d(m);
  bind_task_update(m);
  bind_tensors(m);
#ifdef MTMLK_HAVE_CUDA
  bind_cuda_device(m);
  bind_cuda_inner_loop(m);
  bind_cuda_mlp(m);
#endif
  m.def("fma_peak", &mtmlk_fma_peak, py::call_guard<py::gil_scoped_release>());
  m.def("thread_work", &mtmlk_thread_work);
  m.def("isa", &mtmlk_isa);
  m.def("isa_reason", &mtmlk_isa_reason);
  m.def("isa_available", &mtmlk_isa_available);
  m.def("native_seconds", [] { return native_seconds; });
  m.def("native_thread_time", [](bool on) { native_thread_time = on; });
}
