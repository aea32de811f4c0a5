// `mtml::head_inner_loop`: its two passes.
#include "bindings/common.h"

namespace mtmlk {
namespace {

// What mtml_kernels/native/head_inner_loop.py lists, in its order.
MtmlkHeadCall head_call(const std::vector<int64_t>& sizes, const std::vector<double>& numbers, const Addresses& at) {
  MtmlkHeadCall c = {};
  c.dtype = int32_t(sizes.at(0)), c.threads = int32_t(sizes.at(1));
  c.tasks = sizes.at(2), c.support = sizes.at(3), c.query = sizes.at(4), c.features = sizes.at(5);
  c.classes = sizes.at(6), c.steps = sizes.at(7), c.rate_groups = sizes.at(8), c.needs_rates = int32_t(sizes.at(9));
  c.support_loss = {int32_t(numbers.at(0)), int32_t(numbers.at(1)), numbers.at(2)};
  c.query_loss = {int32_t(numbers.at(3)), int32_t(numbers.at(4)), numbers.at(5)};
  c.decay = numbers.at(6), c.proximal = numbers.at(7);
  c.support_x = as<void>(at.at(0)), c.query_x = as<void>(at.at(1)), c.weight = as<void>(at.at(2));
  c.bias = as<void>(at.at(3)), c.rates = as<void>(at.at(4)), c.support_y = as<void>(at.at(5));
  c.query_y = as<void>(at.at(6)), c.support_mask = as<void>(at.at(7)), c.query_mask = as<void>(at.at(8));
  c.carry = as<void>(at.at(9));
  c.grad_loss = as<void>(at.at(10)), c.grad_logits = as<void>(at.at(11));
  c.grad_support_losses = as<void>(at.at(12)), c.grad_coefficients = as<void>(at.at(13));
  return c;
}

void head_loop(const std::vector<int64_t>& sizes, const std::vector<double>& numbers, const Addresses& inputs,
               const Addresses& outputs) {
  const Timed timed;
  MtmlkHeadCall call = head_call(sizes, numbers, inputs);
  call.loss = as<void>(outputs.at(0)), call.logits = as<void>(outputs.at(1));
  call.support_losses = as<void>(outputs.at(2)), call.coefficients = as<void>(outputs.at(3));
  MtmlkError error = {};
  int status;
  {
    const py::gil_scoped_release release;
    status = mtmlk_head_loop(&call, &error);
  }
  finish(status, error);
}

void head_chain(const std::vector<int64_t>& sizes, const std::vector<double>& numbers, const Addresses& inputs,
                const Addresses& outputs) {
  const Timed timed;
  MtmlkHeadCall call = head_call(sizes, numbers, inputs);
  call.grad_support_x = as<void>(outputs.at(0)), call.grad_query_x = as<void>(outputs.at(1));
  call.grad_weight = as<void>(outputs.at(2)), call.grad_bias = as<void>(outputs.at(3));
  call.grad_rates = as<void>(outputs.at(4));
  int status;
  {
    const py::gil_scoped_release release;
    status = mtmlk_head_chain(&call);
  }
  finish(status, MtmlkError{});
}

}  // namespace

void bind_head_inner_loop(py::module_& m) {
  m.def("head_loop", &head_loop);
  m.def("head_chain", &head_chain);
}

}  // namespace mtmlk
