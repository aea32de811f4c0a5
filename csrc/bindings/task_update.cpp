// `mtml::task_update`: its two passes.
#include "bindings/common.h"

namespace mtmlk {
namespace {

// What mtml_kernels/native/task_update.py lists, in its order.
MtmlkTaskUpdate update_call(const std::vector<int64_t>& numbers, const std::vector<double>& hyper,
                            const std::vector<int64_t>& table, const std::vector<Addresses>& in) {
  MtmlkTaskUpdate c = {};
  c.dtype = int32_t(numbers.at(0)), c.threads = int32_t(numbers.at(1));
  c.rule = int32_t(numbers.at(2)), c.flags = int32_t(numbers.at(3));
  c.tasks = numbers.at(4), c.step = numbers.at(5), c.n = int64_t(table.size() / 3);
  c.hyper = hyper.data();
  c.sizes = table.data(), c.rate_tasks = c.sizes + c.n, c.rate_elements = c.rate_tasks + c.n;
  c.params = list_in(in.at(0)), c.grads = list_in(in.at(1)), c.rates = list_in(in.at(2));
  c.moments = list_in(in.at(3));
  return c;
}

void task_update(const std::vector<int64_t>& numbers, const std::vector<double>& hyper,
                 const std::vector<int64_t>& table, const std::vector<Addresses>& in,
                 const std::vector<Addresses>& out) {
  const Timed timed;
  MtmlkTaskUpdate c = update_call(numbers, hyper, table, in);
  c.params_after = list_out(out.at(0)), c.moments_after = list_out(out.at(1));
  int status;
  {
    const py::gil_scoped_release release;
    status = mtmlk_task_update(&c);
  }
  finish(status, MtmlkError{});
}

void task_update_back(const std::vector<int64_t>& numbers, const std::vector<double>& hyper,
                      const std::vector<int64_t>& table, const std::vector<Addresses>& in,
                      const std::vector<Addresses>& out) {
  const Timed timed;
  MtmlkTaskUpdate c = update_call(numbers, hyper, table, in);
  c.cot_params = list_in(in.at(4)), c.cot_moments = list_in(in.at(5));
  c.d_params = list_out(out.at(0)), c.d_grads = list_out(out.at(1)), c.d_rates = list_out(out.at(2));
  c.d_moments = list_out(out.at(3)), c.d_hyper = as<double>(out.at(4).at(0));
  int status;
  {
    const py::gil_scoped_release release;
    status = mtmlk_task_update_back(&c);
  }
  finish(status, MtmlkError{});
}

}  // namespace

void bind_task_update(py::module_& m) {
  m.def("task_update", &task_update);
  m.def("task_update_back", &task_update_back);
}

}  // namespace mtmlk
