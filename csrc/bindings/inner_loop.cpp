// `mtml::inner_loop`: plans and their runs.
#include <memory>
#include <utility>

#include "bindings/inner_loop_plan.h"

namespace mtmlk {
namespace {

InnerLoopInputs inputs_of(Addresses params, Addresses support_x, Address support_y, Addresses query_x, Address query_y,
                          Address support_mask, Address query_mask, Addresses lr, Address step_weights) {
  InnerLoopInputs in;
  in.params = std::move(params), in.support_x = std::move(support_x), in.query_x = std::move(query_x);
  in.lr = std::move(lr), in.support_y = support_y, in.query_y = query_y;
  in.support_mask = support_mask, in.query_mask = query_mask, in.step_weights = step_weights;
  return in;
}

}  // namespace

void bind_inner_loop(py::module_& m) {
  using py::arg;
  py::class_<InnerLoopInputs>(m, "InnerLoopInputs")
      .def(py::init(&inputs_of), py::kw_only(), arg("params"), arg("support_x"), arg("support_y"), arg("query_x"),
           arg("query_y"), arg("support_mask"), arg("query_mask"), arg("lr"), arg("step_weights"))
      .def_readwrite("hyper", &InnerLoopInputs::hyper)
      .def_readwrite("moments", &InnerLoopInputs::moments);
  m.def("let_plans_rest", [](bool on) { plans_rest = on; });
  py::class_<PlanInfo>(m, "PlanInfo")
      .def_readonly("carry_cols", &PlanInfo::carry_cols)
      .def_readonly("carry_per_task", &PlanInfo::carry_per_task)
      .def_readonly("low_rank", &PlanInfo::low_rank)
      .def_readonly("ids", &PlanInfo::ids);
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
      .def(py::init<int, const std::vector<int64_t>&, const std::vector<double>&, const std::vector<bool>&, int64_t,
                    int64_t, int64_t, const std::vector<int>&, const std::vector<int>&, const std::vector<double>&,
                    bool, int, int, const std::vector<int64_t>&, const std::vector<bool>&, int,
                    const std::vector<int64_t>&, bool, bool, bool, bool>(),
           py::kw_only(), arg("dtype"), arg("program"), arg("consts"), arg("adapted"), arg("support"), arg("query"),
           arg("steps"), arg("support_loss"), arg("query_loss"), arg("loss_args"), arg("first_order"), arg("needs"),
           arg("keep"), arg("lr_steps"), arg("lr_elements"), arg("form"), arg("update"), arg("starts"), arg("per_step"),
           arg("query_steps"), arg("tasks_apart"))
      .def("info", &Plan::info)
      .def("threads", &Plan::threads, arg("tasks"), arg("most"))
      .def("forward", &Plan::forward)
      .def("backward", &Plan::backward)
      .def("carry_to_grads", &Plan::carry_to_grads, arg("carry"), arg("tasks"), arg("scale"), arg("stride"),
           arg("params"), arg("lr"), arg("threads"), arg("hyper") = Address(0), arg("moments") = Addresses());
}

}  // namespace mtmlk
