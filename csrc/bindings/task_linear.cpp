// `mtml::task_linear`: its two passes.
#include "bindings/common.h"

namespace mtmlk {
namespace {

// What mtml_kernels/native/task_linear.py lists, in its order.
void task_linear(const std::vector<int64_t>& sizes, double c0, double c1, const Addresses& at, bool backward) {
  const Timed timed;
  MtmlkTaskLinear c = {};
  c.dtype = int32_t(sizes.at(0)), c.threads = int32_t(sizes.at(1));
  c.tasks = sizes.at(2), c.rows = sizes.at(3), c.inputs = sizes.at(4), c.outputs = sizes.at(5);
  c.weights = sizes.at(6), c.biases = sizes.at(7), c.activation = int32_t(sizes.at(8));
  c.c0 = c0, c.c1 = c1;
  c.x = as<void>(at.at(0)), c.weight = as<void>(at.at(1)), c.bias = as<void>(at.at(2)), c.y = as<void>(at.at(3));
  c.grad = as<void>(at.at(4));
  c.dx = as<void>(at.at(5)), c.dw = as<void>(at.at(6)), c.db = as<void>(at.at(7));
  int status;
  {
    const py::gil_scoped_release release;
    status = backward ? mtmlk_task_linear_back(&c) : mtmlk_task_linear(&c);
  }
  finish(status, MtmlkError{});
}

}  // namespace

void bind_task_linear(py::module_& m) { m.def("task_linear", &task_linear); }

}  // namespace mtmlk
