// Calls of `mtml::inner_loop` on the CPU engine with no Python between: their tensors read, room made, the plan run, the
// results handed out. mtml_kernels/native/inner_loop_lane.py makes what is here, once for calls of equal form.
#include <array>
#include <memory>
#include <utility>

#include "bindings/inner_loop_plan.h"
#include "bindings/lane_memory.h"

namespace mtmlk {
namespace {

constexpr int64_t kAny = INT64_MAX;

// As many as PyTorch allows by now.
int threads_now() {
  static PyObject* const torch = PyImport_ImportModule("torch");
  static PyObject* const name = PyUnicode_InternFromString("get_num_threads");
  PyObject* self = torch;
  const py::object found = py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(name, &self, 1, nullptr));
  if (!found) throw py::error_already_set();
  return found.cast<int>();
}

// Which tensors a call brings, in the order of `InnerLoopArgs.tensors`: how many of each list, then five single ones.
struct Lists {
  size_t params, lr, support_x, query_x, hyper, moments;

  explicit Lists(const std::array<size_t, 6>& n)
      : params(n[0]), lr(n[1]), support_x(n[2]), query_x(n[3]), hyper(n[4]), moments(n[5]) {}

  size_t count() const { return params + lr + support_x + query_x + hyper + moments + 5; }

  void fits(const MtmlkPlanInfo& plan) const {
    const auto all = [](size_t n, int64_t of) { return int64_t(n) == of; };
    if (!all(params, plan.n_params) || !all(lr, plan.n_rates) || !all(support_x, plan.n_inputs) ||
        (query_x && !all(query_x, plan.n_inputs)) || hyper > 1 ||
        (moments && !all(moments, plan.n_moments * plan.n_adapted)))
      throw Malformed("lists: expected as many tensors as the plan reads");
  }

  void read(const py::bytes& addresses, MtmlkCall& call) const {
    if (size_t(PyBytes_GET_SIZE(addresses.ptr())) != count() * sizeof(Address))
      throw Malformed("addresses: expected those of a call of this form");
    const void* const* at = reinterpret_cast<const void* const*>(PyBytes_AS_STRING(addresses.ptr()));
    const auto take = [&at](size_t n) { return n ? std::exchange(at, at + n) : nullptr; };
    call.params = take(params), call.lr = take(lr), call.support_x = take(support_x), call.query_x = take(query_x);
    if (hyper) call.hyper = static_cast<const double*>(*take(hyper));
    call.moments = take(moments);
    call.support_y = at[0], call.query_y = at[1], call.support_mask = at[2], call.query_mask = at[3];
    call.step_weights = at[4];
  }
};

// The way there: from addresses to (the outputs, the carry).
class PlanForward {
 public:
  // outputs: the shapes of loss, output and support losses, of `adapted` parameters that are kept and of moments. carry:
  // of what is left for the way back, none where nothing is differentiated; those behind the first are gradients of the
  // data, of the places (of six) that `data` says.
  PlanForward(const std::shared_ptr<Home>& home, std::shared_ptr<const Plan> plan, int64_t tasks,
              const std::array<size_t, 6>& lists, const std::vector<Shape>& outputs, size_t adapted,
              const std::vector<Shape>& carry, std::vector<size_t> data)
      : plan_(std::move(plan)),
        lists_(lists),
        outputs_(home, outputs, 16 * 1024),  // the losses of every step may be kept, and all else with them
        carry_(home, carry, kAny),           // goes with the graph, whoever keeps the outputs
        adapted_(adapted),
        data_(std::move(data)),
        tasks_(tasks) {
    const MtmlkPlanInfo& counts = plan_->counts();
    lists_.fits(counts);
    const size_t moments = size_t(counts.n_moments * counts.n_adapted);
    const bool all = outputs.size() == kFixed + adapted || outputs.size() == kFixed + adapted + moments;
    if (!all || (adapted && adapted != size_t(counts.n_adapted)))
      throw Malformed("outputs: expected loss, output, support losses and what the plan keeps");
    if (!carry.empty() && elements_of(carry[0]) != (counts.carry_per_task ? tasks : 1) * counts.carry_cols)
      throw Malformed("carry: expected the plan's rows and columns first");
    if (carry.size() != (carry.empty() ? 0 : 1 + data_.size()) || data_.size() > kData)
      throw Malformed("carry: expected one shape and one for each gradient of the data");
    for (const size_t place : data_)
      if (place >= kData) throw Malformed("data: expected places below 6");
    for (const Shape& shape : outputs) written_.push_back(elements_of(shape) > 0);
  }

  py::tuple operator()(const py::bytes& addresses) const {
    MtmlkCall call = {};
    call.tasks = tasks_, call.threads = threads_now(), call.differentiate = carry_.count() > 0;
    lists_.read(addresses, call);
    std::vector<void*> at(outputs_.count()), left(carry_.count());
    Room::Memory outputs, carry;
    outputs_.make(outputs, at.data());
    carry_.make(carry, left.data());
    const std::vector<void*> to = written(at);
    set_targets(call, to.data(), left);
    plan_->start(call);
    py::tuple found(outputs_.count()), carried(carry_.count());
    outputs_.hand_out(outputs, at.data(), found, 0);
    carry_.hand_out(carry, left.data(), carried, 0);
    return py::make_tuple(std::move(found), std::move(carried));
  }

 private:
  static constexpr size_t kFixed = 3, kData = 6;

  // Nowhere where there are no elements.
  std::vector<void*> written(std::vector<void*> at) const {
    for (size_t i = 0; i < at.size(); ++i)
      if (!written_[i]) at[i] = nullptr;
    return at;
  }

  void set_targets(MtmlkCall& call, void* const* outputs, const std::vector<void*>& carry) const {
    call.loss = outputs[0], call.output = outputs[1], call.support_losses = outputs[2];
    const size_t kept = outputs_.count() - kFixed;
    call.adapted = adapted_ ? outputs + kFixed : nullptr;
    call.moments_after = kept > adapted_ ? outputs + kFixed + adapted_ : nullptr;
    if (carry.empty()) return;
    call.carry = carry[0];
    void** const places[kData] = {&call.grad_support_x, &call.grad_query_x,      &call.grad_support_y,
                                  &call.grad_query_y,   &call.grad_support_mask, &call.grad_query_mask};
    for (size_t i = 0; i < data_.size(); ++i) *places[data_[i]] = carry[1 + i];
  }

  std::shared_ptr<const Plan> plan_;
  Lists lists_;
  Room outputs_, carry_;
  size_t adapted_;
  std::vector<size_t> data_;
  std::vector<char> written_;
  int64_t tasks_;
};

// The way back from cotangents of the losses alone: what the way there carried, scaled and added up.
class PlanBackward {
 public:
  // wanted: which of the parameters, and of the rates behind them, get gradients, of `shapes`.
  PlanBackward(std::shared_ptr<Home> home, std::shared_ptr<const Plan> plan, int64_t tasks, Shape carry,
               std::vector<size_t> wanted, const std::vector<Shape>& shapes)
      : home_(std::move(home)),
        plan_(std::move(plan)),
        carry_(std::move(carry)),
        wanted_(std::move(wanted)),
        room_(home_, shapes, 1024 * 1024),
        tasks_(tasks) {
    if (wanted_.size() != shapes.size()) throw Malformed("wanted: expected one a shape");
    for (const size_t i : wanted_)
      if (i >= count()) throw Malformed("wanted: expected places of parameters and rates");
    if (carry_.size() != 2) throw Malformed("carry: expected [T or 1, columns]");
  }

  // The gradients behind None for each of the Function's arguments that gets none. None alone where a cotangent is not
  // plain, others than the first came, or they cannot be had from the carry.
  py::object operator()(const py::tuple& cotangents, const py::handle& carry) const {
    for (size_t i = 1; i < cotangents.size(); ++i)
      if (!cotangents[i].is_none()) return py::none();
    TensorView scale, carried;
    if (!home_->tensors->look_along(cotangents[0].ptr(), tasks_, home_->bits, scale) || !is_carry(carry, carried))
      return py::none();
    std::vector<void*> at(room_.count()), grads(count());
    Room::Memory memory;
    room_.make(memory, at.data());
    for (size_t i = 0; i < wanted_.size(); ++i) grads[wanted_[i]] = at[i];
    void* const* const lr_grads = grads.data() + plan_->counts().n_params;
    if (!plan_->spread(carried.data, tasks_, {scale.data, scale.strides[0]}, grads.data(), lr_grads, threads_now()))
      return py::none();
    py::tuple found(kLeading + room_.count());
    for (size_t i = 0; i < kLeading; ++i) PyTuple_SET_ITEM(found.ptr(), py::ssize_t(i), py::none().release().ptr());
    room_.hand_out(memory, at.data(), found, kLeading);
    return std::move(found);
  }

 private:
  static constexpr size_t kLeading = 3;  // of `_ByLane` in mtml_kernels/ops/inner_loop_lane.py

  size_t count() const { return size_t(plan_->counts().n_params + plan_->counts().n_rates); }

  bool is_carry(const py::handle& t, TensorView& v) const {
    return home_->tensors->look_at(t.ptr(), home_->device_type, home_->device_index, home_->bits, v) && v.ndim == 2 &&
           v.shape[0] == carry_[0] && v.shape[1] == carry_[1];
  }

  std::shared_ptr<Home> home_;
  std::shared_ptr<const Plan> plan_;
  Shape carry_;
  std::vector<size_t> wanted_;
  Room room_;
  int64_t tasks_;
};

}  // namespace

void bind_inner_loop_plan_lane(py::module_& m) {
  using py::arg;
  py::class_<PlanForward>(m, "PlanForward")
      .def(py::init<const std::shared_ptr<Home>&, std::shared_ptr<Plan>, int64_t, const std::array<size_t, 6>&,
                    const std::vector<Shape>&, size_t, const std::vector<Shape>&, std::vector<size_t>>(),
           py::kw_only(), arg("home"), arg("plan"), arg("tasks"), arg("lists"), arg("outputs"), arg("adapted"),
           arg("carry"), arg("data"))
      .def("__call__", &PlanForward::operator());
  py::class_<PlanBackward>(m, "PlanBackward")
      .def(py::init<std::shared_ptr<Home>, std::shared_ptr<Plan>, int64_t, Shape, std::vector<size_t>,
                    const std::vector<Shape>&>(),
           py::kw_only(), arg("home"), arg("plan"), arg("tasks"), arg("carry"), arg("wanted"), arg("shapes"))
      .def("__call__", &PlanBackward::operator());
}

}  // namespace mtmlk
