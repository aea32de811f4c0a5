// An engine's plan of an inner loop, made once for sizes and options, and its runs.
#pragma once

#include <memory>

#include "bindings/inner_loop_inputs.h"

namespace mtmlk {

// Nothing in place of the engine's passes: what is around them can then be timed.
inline bool plans_rest = false;

// What is worked out when a plan is made.
struct PlanInfo {
  int64_t carry_cols;
  bool carry_per_task;
  int64_t low_rank;  // weights in low-rank form
  py::tuple ids;     // the inputs that are ids
};

class Plan {
 public:
  Plan(int dtype, const std::vector<int64_t>& program, const std::vector<double>& consts,
       const std::vector<bool>& adapted, int64_t support, int64_t query, int64_t steps,
       const std::vector<int>& support_loss, const std::vector<int>& query_loss, const std::vector<double>& loss_args,
       bool first_order, int needs, int keep, const std::vector<int64_t>& lr_steps,
       const std::vector<bool>& lr_elements, int form, const std::vector<int64_t>& update, bool starts, bool per_step,
       bool query_steps, bool tasks_apart) {
    const std::vector<uint8_t> adapted_bytes(adapted.begin(), adapted.end()),
        elements(lr_elements.begin(), lr_elements.end());
    MtmlkPlanSpec spec = {};
    spec.dtype = dtype;
    spec.program = program.data(), spec.n_program = int64_t(program.size());
    spec.consts = consts.data(), spec.n_consts = int64_t(consts.size());
    spec.adapted = adapted_bytes.data(), spec.n_adapted = int64_t(adapted_bytes.size());
    spec.support = support, spec.query = query, spec.steps = steps;
    spec.support_loss = {support_loss.at(0), support_loss.at(1), loss_args.at(0)};
    spec.query_loss = {query_loss.at(0), query_loss.at(1), loss_args.at(1)};
    spec.first_order = first_order, spec.needs = needs, spec.keep = keep;
    spec.lr_steps = lr_steps.data(), spec.lr_elements = elements.data(), spec.n_lr = int64_t(lr_steps.size());
    spec.form = form;
    const std::vector<uint8_t> own(starts ? adapted.size() : 0, 1);
    spec.rule = int32_t(update.at(0)), spec.rule_flags = int32_t(update.at(1)), spec.taken = update.at(2);
    spec.starts = own.empty() ? nullptr : own.data(), spec.per_step = per_step;
    spec.query_steps = query_steps, spec.tasks_apart = tasks_apart;
    MtmlkPlan* plan = nullptr;
    MtmlkReason reason = {};
    const int status = mtmlk_plan_create(&spec, &plan, &reason);
    if (status == MTMLK_BAD_PROGRAM) throw Malformed(std::string("program: ") + reason.text);
    finish(status, MtmlkError{});
    plan_.reset(plan);
    keeps_ = keep != 0;
    mtmlk_plan_info(plan, &info_);
  }

  PlanInfo info() const {
    py::list ids;
    for (int64_t i = 0; i < info_.n_inputs; ++i)
      if (mtmlk_reads_ids(plan_.get(), i)) ids.append(i);
    return {info_.carry_cols, info_.carry_per_task != 0, info_.low_rank, py::tuple(ids)};
  }

  const MtmlkPlanInfo& counts() const { return info_; }

  int threads(int64_t tasks, int most) const { return mtmlk_plan_threads(plan_.get(), tasks, most); }

  // Writes the outputs and, where `differentiate`, the meta-gradient of every task's loss. 0: nowhere.
  void forward(int64_t tasks, int threads, const InnerLoopInputs& inputs, Address loss, Address output,
               Address support_losses, const Addresses& adapted, bool differentiate, Address carry,
               const Addresses& data_gradients) const {
    MtmlkCall call = called(tasks, threads, inputs);
    call.loss = as<void>(loss), call.output = as<void>(output), call.support_losses = as<void>(support_losses);
    const Kept kept = split("adapted", adapted);
    call.adapted = kept.params ? list_out(adapted) : nullptr;
    call.moments_after = kept.moments ? list_out(adapted) + kept.params : nullptr;
    call.differentiate = differentiate;
    run(call, carry, data_gradients);
  }

  // Writes the meta-gradients of sum <cotangent, output>. 0: no cotangent, nowhere.
  void backward(int64_t tasks, int threads, const InnerLoopInputs& inputs, Address grad_loss, Address grad_output,
                Address grad_support_losses, const Addresses& grad_adapted, Address carry,
                const Addresses& data_gradients) const {
    MtmlkCall call = called(tasks, threads, inputs);
    call.differentiate = true;
    call.grad_loss = as<void>(grad_loss), call.grad_output = as<void>(grad_output);
    call.grad_support_losses = as<void>(grad_support_losses);
    const Kept kept = split("grad_adapted", grad_adapted);
    call.grad_adapted = kept.params ? list_in(grad_adapted) : nullptr;
    call.grad_moments = kept.moments ? list_in(grad_adapted) + kept.params : nullptr;
    run(call, carry, data_gradients);
  }

  bool carry_to_grads(Address carry, int64_t tasks, Address scale, int64_t stride, const Addresses& grads,
                      const Addresses& lr_grads, int threads, Address hyper_grads,
                      const Addresses& moment_grads) const {
    expect("params", grads, info_.n_params), expect("lr", lr_grads, info_.n_rates);
    expect_or_none("moments", moment_grads, info_.n_moments * info_.n_adapted);
    return spread(as<void>(carry), tasks, {as<void>(scale), stride}, list_out(grads), list_out(lr_grads), threads,
                  as<void>(hyper_grads), list_out(moment_grads));
  }

  // A call whose addresses stand.
  void start(const MtmlkCall& call) const {
    if (plans_rest) return;
    const Timed timed;
    MtmlkError error = {};
    int status;
    {
      const py::gil_scoped_release release;
      status = mtmlk_inner_loop(plan_.get(), &call, &error);
    }
    finish(status, error);
  }

  struct Scale {
    const void* data;  // [T]
    int64_t stride;
  };

  // False where the tasks' sum alone was carried and the scales differ. As many gradients as parameters and rates.
  bool spread(const void* carry, int64_t tasks, const Scale& scale, void* const* grads, void* const* lr_grads,
              int threads, void* hyper_grads = nullptr, void* const* moment_grads = nullptr) const {
    if (plans_rest) return true;
    const Timed timed;
    int status;
    {
      const py::gil_scoped_release release;
      status = mtmlk_carry_to_grads(plan_.get(), carry, tasks, scale.data, scale.stride, grads, lr_grads, hyper_grads,
                                    moment_grads, threads);
    }
    if (status == MTMLK_OUT_OF_MEMORY || status == MTMLK_STOPPED) finish(status, MtmlkError{});
    return status == MTMLK_OK;
  }

 private:
  struct Destroy {
    void operator()(MtmlkPlan* plan) const { mtmlk_plan_destroy(plan); }
  };

  static void expect(const char* name, const Addresses& list, int64_t count) {
    if (int64_t(list.size()) != count)
      throw Malformed(std::string(name) + ": expected " + std::to_string(count) + " tensors, got " +
                      std::to_string(list.size()));
  }

  static void expect_or_none(const char* name, const Addresses& list, int64_t count) {
    if (!list.empty()) expect(name, list, count);
  }

  // What is kept of a call: adapted parameters, moments of the rule behind them, both or nothing.
  struct Kept {
    int64_t params, moments;
  };

  Kept split(const char* name, const Addresses& list) const {
    const int64_t count = int64_t(list.size()), moments = info_.n_moments * info_.n_adapted;
    if (count == 0 || (count == info_.n_adapted && keeps_)) return {count, 0};
    if (count == moments && !keeps_) return {0, moments};
    expect(name, list, info_.n_adapted + moments);
    return {info_.n_adapted, moments};
  }

  MtmlkCall called(int64_t tasks, int threads, const InnerLoopInputs& in) const {
    expect("params", in.params, info_.n_params), expect("lr", in.lr, info_.n_rates);
    expect_or_none("support_x", in.support_x, info_.n_inputs);
    expect_or_none("query_x", in.query_x, info_.n_inputs);
    MtmlkCall call = {};
    call.tasks = tasks, call.threads = threads;
    call.params = list_in(in.params), call.lr = list_in(in.lr);
    call.support_x = list_in(in.support_x), call.query_x = list_in(in.query_x);
    call.support_y = as<void>(in.support_y), call.query_y = as<void>(in.query_y);
    call.support_mask = as<void>(in.support_mask), call.query_mask = as<void>(in.query_mask);
    call.step_weights = as<void>(in.step_weights);
    expect_or_none("moments", in.moments, info_.n_moments * info_.n_adapted);
    call.hyper = as<double>(in.hyper), call.moments = list_in(in.moments);
    return call;
  }

  // data_gradients: none, or of support_x, query_x, support_y, query_y, support_mask, query_mask.
  void run(MtmlkCall& call, Address carry, const Addresses& data_gradients) const {
    call.carry = as<void>(carry);
    expect_or_none("data_gradients", data_gradients, 6);
    if (!data_gradients.empty()) {
      const auto at = [&](size_t i) { return as<void>(data_gradients[i]); };
      call.grad_support_x = at(0), call.grad_query_x = at(1), call.grad_support_y = at(2), call.grad_query_y = at(3);
      call.grad_support_mask = at(4), call.grad_query_mask = at(5);
    }
    start(call);
  }

  std::unique_ptr<MtmlkPlan, Destroy> plan_;
  MtmlkPlanInfo info_;
  bool keeps_ = false;  // adapted parameters
};

}  // namespace mtmlk
