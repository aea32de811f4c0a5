// `mtml::task_conv2d`: its two passes.
#include "bindings/common.h"

namespace mtmlk {
namespace {

// What mtml_kernels/native/task_conv2d.py lists, in its order.
void task_conv2d(const std::vector<int64_t>& sizes, const Addresses& at, bool backward) {
  const Timed timed;
  MtmlkTaskConv2d c = {};
  c.dtype = int32_t(sizes.at(0)), c.threads = int32_t(sizes.at(1));
  c.tasks = sizes.at(2), c.samples = sizes.at(3), c.channels = sizes.at(4), c.outputs = sizes.at(5);
  c.groups = sizes.at(6), c.weights = sizes.at(7), c.biases = sizes.at(8);
  int64_t* const pairs[6] = {c.size, c.out, c.kernel, c.stride, c.pad, c.dilation};
  for (size_t i = 0; i < 12; ++i) pairs[i / 2][i % 2] = sizes.at(9 + i);
  c.x = as<void>(at.at(0)), c.weight = as<void>(at.at(1)), c.bias = as<void>(at.at(2)), c.y = as<void>(at.at(3));
  c.grad = as<void>(at.at(4));
  c.dx = as<void>(at.at(5)), c.dw = as<void>(at.at(6)), c.db = as<void>(at.at(7));
  int status;
  {
    const py::gil_scoped_release release;
    status = backward ? mtmlk_task_conv2d_back(&c) : mtmlk_task_conv2d(&c);
  }
  finish(status, MtmlkError{});
}

}  // namespace

void bind_task_conv2d(py::module_& m) { m.def("task_conv2d", &task_conv2d); }

}  // namespace mtmlk
