// With bindings_tensors.h the only file that knows Python. Tensors come as addresses (tensor.data_ptr()), which
// mtml_kernels/native/__init__.py checks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "mtml/abi.h"
#include "bindings/tensors.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using Addresses = std::vector<Address>;

double native_seconds = 0;  // spent inside the engine, under the GIL's protection

class Timed {
 public:
  Timed() : start_(std::chrono::steady_clock::now()) {}
  ~Timed() { native_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_;
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

const void* const* list_in(const Addresses& a) {
  return a.empty() ? nullptr : reinterpret_cast<const void* const*>(a.data());
}
void* const* list_out(const Addresses& a) { return a.empty() ? nullptr : reinterpret_cast<void* const*>(a.data()); }

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

// With the GIL: what a handler has raised.
void check_stopped(int status) {
  if (status == MTMLK_STOPPED) throw py::error_already_set();
}

[[noreturn]] void fail(int status, const MtmlkError& error) {
  check_stopped(status);
  if (status == MTMLK_BAD_LABEL)
    throw BadLabel(std::to_string(error.is_query) + " " + std::to_string(error.task) + " " +
                   std::to_string(error.sample) + " " + std::to_string(error.label));
  if (status == MTMLK_BAD_ID)
    throw BadId(std::to_string(error.is_query) + " " + std::to_string(error.input) + " " + std::to_string(error.task) +
                " " + std::to_string(error.sample) + " " + std::to_string(error.label) + " " +
                std::to_string(error.rows));
  if (status == MTMLK_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status == MTMLK_NO_LOW_RANK) throw NoLowRank("no weight of this program admits low-rank form");
  throw Malformed(error.what ? std::string(error.what) + ": expected what the call reads, got none"
                             : "status " + std::to_string(status));
}

class Plan {
 public:
  Plan(int dtype, const std::vector<int64_t>& program, const std::vector<double>& consts,
       const std::vector<bool>& adapted, int64_t support, int64_t query, int64_t steps, const std::vector<int>& losses,
       const std::vector<double>& loss_args, bool first_order, int needs, int keep,
       const std::vector<int64_t>& lr_steps, const std::vector<bool>& lr_elements, int form) {
    const std::vector<uint8_t> adapted_bytes(adapted.begin(), adapted.end()),
        elements(lr_elements.begin(), lr_elements.end());
    MtmlkPlanSpec spec = {};
    spec.dtype = dtype;
    spec.program = program.data(), spec.n_program = int64_t(program.size());
    spec.consts = consts.data(), spec.n_consts = int64_t(consts.size());
    spec.adapted = adapted_bytes.data(), spec.n_adapted = int64_t(adapted_bytes.size());
    spec.support = support, spec.query = query, spec.steps = steps;
    spec.support_loss = {losses.at(0), losses.at(1), loss_args.at(0)};
    spec.query_loss = {losses.at(2), losses.at(3), loss_args.at(1)};
    spec.first_order = first_order, spec.needs = needs, spec.keep = keep;
    spec.lr_steps = lr_steps.data(), spec.lr_elements = elements.data(), spec.n_lr = int64_t(lr_steps.size());
    spec.form = form;
    MtmlkPlan* plan = nullptr;
    MtmlkReason reason = {};
    const int status = mtmlk_plan_create(&spec, &plan, &reason);
    if (status == MTMLK_BAD_PROGRAM) throw Malformed(std::string("program: ") + reason.text);
    if (status != MTMLK_OK) fail(status, {});
    plan_.reset(plan);
    mtmlk_plan_info(plan, &info_);
    py::list ids;
    for (int64_t i = 0; i < info_.n_inputs; ++i)
      if (mtmlk_reads_ids(plan, i)) ids.append(i);
    ids_ = py::tuple(ids);
  }

  py::tuple info() const {
    const MtmlkPlanInfo& i = info_;
    return py::make_tuple(i.carry_cols, i.carry_per_task != 0, i.support_x_size, i.query_x_size, i.low_rank);
  }

  // The inputs that are ids.
  const py::tuple& ids() const { return ids_; }

  void run(int64_t tasks, int threads, const Addresses& params, const Addresses& support_x, Address support_y,
           const Addresses& query_x, Address query_y, Address support_mask, Address query_mask, const Addresses& lr,
           Address step_weights, Address loss, Address output, Address support_losses, const Addresses& adapted,
           bool differentiate, Address grad_loss, Address grad_output, Address grad_support_losses,
           const Addresses& grad_adapted, Address carry, Address grad_support_x, Address grad_query_x) const {
    const Timed timed;
    expect("params", params, info_.n_params), expect("lr", lr, info_.n_rates);
    for (const auto& [name, list] : {std::pair{"support_x", &support_x}, {"query_x", &query_x}})
      if (!list->empty()) expect(name, *list, info_.n_inputs);
    for (const auto& [name, list] : {std::pair{"adapted", &adapted}, {"grad_adapted", &grad_adapted}})
      if (!list->empty()) expect(name, *list, info_.n_adapted);
    MtmlkCall call = {};
    call.tasks = tasks, call.threads = threads;
    call.params = list_in(params), call.support_x = list_in(support_x), call.query_x = list_in(query_x);
    call.support_y = as<void>(support_y), call.query_y = as<void>(query_y);
    call.support_mask = as<void>(support_mask), call.query_mask = as<void>(query_mask);
    call.lr = list_in(lr), call.step_weights = as<void>(step_weights);
    call.loss = as<void>(loss), call.output = as<void>(output), call.support_losses = as<void>(support_losses);
    call.adapted = list_out(adapted);
    call.differentiate = differentiate;
    call.grad_loss = as<void>(grad_loss), call.grad_output = as<void>(grad_output);
    call.grad_support_losses = as<void>(grad_support_losses), call.grad_adapted = list_in(grad_adapted);
    call.carry = as<void>(carry), call.grad_support_x = as<void>(grad_support_x),
    call.grad_query_x = as<void>(grad_query_x);
    MtmlkError error = {};
    int status;
    {
      const py::gil_scoped_release release;
      status = mtmlk_inner_loop(plan_.get(), &call, &error);
    }
    if (status != MTMLK_OK) fail(status, error);
  }

  bool carry_to_grads(Address carry, int64_t tasks, Address scale, int64_t stride, const Addresses& grads,
                      const Addresses& lr_grads, int threads) const {
    const Timed timed;
    expect("params", grads, info_.n_params), expect("lr", lr_grads, info_.n_rates);
    int status;
    {
      const py::gil_scoped_release release;
      status = mtmlk_carry_to_grads(plan_.get(), as<void>(carry), tasks, as<void>(scale), stride, list_out(grads),
                                    list_out(lr_grads), threads);
    }
    if (status == MTMLK_OUT_OF_MEMORY || status == MTMLK_STOPPED) fail(status, {});
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

  std::unique_ptr<MtmlkPlan, Destroy> plan_;
  MtmlkPlanInfo info_;
  py::tuple ids_;
};

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
  if (status != MTMLK_OK) fail(status, error);
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
  if (status != MTMLK_OK) fail(status, {});
}
// The heads of a call, less their tensors. `sizes` has kHeadInts numbers a group of `count` equal heads, whose tensors
// lie one after another.
class Heads {
 public:
  Heads(int dtype, const std::vector<int64_t>& sizes, const std::vector<double>& options)
      : dtype_(dtype), itemsize_(dtype == MTMLK_F32 ? 4 : 8) {
    for (size_t g = 0; g < options.size(); ++g) {
      const int64_t* s = sizes.data() + g * kHeadInts;
      MtmlkHead h = {};
      h.kind = int32_t(s[0]), h.mean = int32_t(s[1]), h.ids = int32_t(s[2]);
      h.rows = s[4], h.classes = s[5], h.inner = s[6], h.ld = s[5];
      h.rows_per_weight = s[7], h.ignore_index = s[8], h.p0 = options[g];
      groups_.push_back({h, s[3], s[9]}), total_ += s[3];
    }
  }

  // Addresses of the groups' tensors; an empty list where there are none.
  void run(int threads, const Addresses& logits, const Addresses& targets, const Addresses& sample_weights,
           const Addresses& class_weights, const Addresses& pos_weights, Address losses,
           const Addresses& gradients) const {
    const Timed timed;
    std::vector<MtmlkHead> heads;
    heads.reserve(size_t(total_));
    const auto at = [](const Addresses& a, size_t g, int64_t bytes) {
      return as<char>(a.empty() || !a[g] ? 0 : a[g] + Address(bytes));
    };
    for (size_t g = 0; g < groups_.size(); ++g)
      for (int64_t i = 0; i < groups_[g].count; ++i) {
        MtmlkHead h = groups_[g].head;
        const int64_t size = i * h.rows * h.classes * itemsize_;
        h.logits = at(logits, g, size), h.gradient = at(gradients, g, size);
        h.target = at(targets, g, i * groups_[g].target_size * (h.ids ? 8 : itemsize_));
        h.sample_weights = at(sample_weights, g, i * (h.rows / h.rows_per_weight) * itemsize_);
        h.class_weights = at(class_weights, g, i * h.classes * itemsize_);
        h.pos_weights = at(pos_weights, g, i * h.classes * itemsize_);
        heads.push_back(h);
      }
    MtmlkHeadError error = {};
    int status;
    {
      const py::gil_scoped_release release;
      status = mtmlk_multihead_loss(heads.data(), int64_t(heads.size()), dtype_, threads, as<void>(losses), &error);
    }
    check_stopped(status);
    if (status == MTMLK_OUT_OF_MEMORY) throw std::bad_alloc();
    if (status == MTMLK_BAD_LABEL)
      throw BadLabel(std::to_string(error.head) + " " + std::to_string(error.row) + " " + std::to_string(error.label));
  }

  // The same without weights, of the addresses of logits and targets as PlainTensors gives them. Gradients (unless 0)
  // lie one after another.
  void run_plain(int threads, const std::string& addresses, Address losses, Address gradients) const {
    const size_t n = groups_.size();
    if (addresses.size() != 2 * n * sizeof(Address)) throw std::invalid_argument("addresses: of other heads");
    Addresses both(2 * n), into;
    std::memcpy(both.data(), addresses.data(), addresses.size());
    for (size_t g = 0; g < n && gradients; ++g) {
      into.push_back(gradients);
      gradients += Address(groups_[g].count * groups_[g].head.rows * groups_[g].head.classes * itemsize_);
    }
    run(threads, {both.begin(), both.begin() + n}, {both.begin() + n, both.end()}, {}, {}, {}, losses, into);
  }

 private:
  static constexpr size_t kHeadInts = 10;
  struct Group {
    MtmlkHead head;
    int64_t count, target_size;
  };
  std::vector<Group> groups_;
  int dtype_;
  int64_t itemsize_, total_ = 0;
};

// Linear heads on shared features, less their tensors.
class LinearHeads {
 public:
  LinearHeads(int dtype, int64_t rows, int64_t features, const std::vector<int64_t>& sizes,
              const std::vector<double>& options)
      : dtype_(dtype), rows_(rows), features_(features) {
    for (size_t i = 0; i < options.size(); ++i) {
      const int64_t* s = sizes.data() + i * kHeadInts;
      MtmlkHead h = {};
      h.kind = int32_t(s[0]), h.mean = int32_t(s[1]), h.ids = int32_t(s[2]), h.classes = s[3], h.ignore_index = s[4];
      h.rows = rows, h.inner = 1, h.rows_per_weight = 1, h.p0 = options[i];
      heads_.push_back(h);
      columns_ += h.classes;
    }
  }

  int64_t stride() const { return mtmlk_linear_stride(dtype_, columns_); }

  // `inputs`: x, then of every head weight, bias, target, sample weights, class weights, pos weights.
  void keep(int threads, const Addresses& inputs, Address losses, Address kept) const {
    const Call call(*this, inputs);
    MtmlkHeadError error = {};
    finish(call.run([&] {
      return mtmlk_linear_keep(&call.linear, dtype_, threads, as<void>(losses), as<void>(kept), &error);
    }),
           error);
  }

  void back(int threads, const Addresses& inputs, Address kept, const std::vector<double>& cotangents, Address dx,
            const Addresses& dw, const Addresses& db) const {
    const Call call(*this, inputs);
    finish(call.run([&] {
      return mtmlk_linear_back(&call.linear, dtype_, threads, as<void>(kept), cotangents.data(), as<void>(dx),
                               list_out(dw), list_out(db));
    }),
           {});
  }

  void blocks(int threads, const Addresses& inputs, Address losses, Address dx, const Addresses& dw,
              const Addresses& db) const {
    const Call call(*this, inputs);
    MtmlkHeadError error = {};
    finish(call.run([&] {
      return mtmlk_linear_blocks(&call.linear, dtype_, threads, as<void>(losses), as<void>(dx), list_out(dw),
                                 list_out(db), &error);
    }),
           error);
  }

 private:
  static constexpr size_t kHeadInts = 5, kTensors = 6;

  struct Call {
    Call(const LinearHeads& self, const Addresses& inputs) : heads(self.heads_) {
      for (size_t i = 0; i < heads.size(); ++i) {
        const Address* a = inputs.data() + 1 + i * kTensors;
        weights.push_back(as<void>(a[0])), biases.push_back(as<void>(a[1]));
        heads[i].target = as<void>(a[2]), heads[i].sample_weights = as<void>(a[3]);
        heads[i].class_weights = as<void>(a[4]), heads[i].pos_weights = as<void>(a[5]);
      }
      linear = {self.rows_,   self.features_, int64_t(heads.size()), as<void>(inputs.at(0)),
                heads.data(), weights.data(), biases.data()};
    }
    template <class F>
    int run(F f) const {
      const Timed timed;
      const py::gil_scoped_release release;
      return f();
    }
    std::vector<MtmlkHead> heads;
    std::vector<const void*> weights, biases;
    MtmlkLinear linear;
  };

  static void finish(int status, const MtmlkHeadError& error) {
    check_stopped(status);
    if (status == MTMLK_OUT_OF_MEMORY) throw std::bad_alloc();
    if (status == MTMLK_BAD_LABEL)
      throw BadLabel(std::to_string(error.head) + " " + std::to_string(error.row) + " " + std::to_string(error.label));
  }

  int dtype_;
  int64_t rows_, features_, columns_ = 0;
  std::vector<MtmlkHead> heads_;
};

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  mtmlk_when_long(run_signal_handlers);
  m.doc() = "The compiled engine of mtml_kernels; use mtml_kernels.native.";
  py::register_exception<BadLabel>(m, "BadLabel", PyExc_ValueError);
  py::register_exception<BadId>(m, "BadId", PyExc_ValueError);
  py::register_exception<NoLowRank>(m, "NoLowRank", PyExc_ValueError);
  py::register_exception<Malformed>(m, "Malformed", PyExc_ValueError);
  py::class_<Plan>(m, "Plan")
      .def(py::init<int, const std::vector<int64_t>&, const std::vector<double>&, const std::vector<bool>&, int64_t,
                    int64_t, int64_t, const std::vector<int>&, const std::vector<double>&, bool, int, int,
                    const std::vector<int64_t>&, const std::vector<bool>&, int>())
      .def("info", &Plan::info)
      .def_property_readonly("ids", &Plan::ids)
      .def("run", &Plan::run)
      .def("carry_to_grads", &Plan::carry_to_grads);
  m.def("head_loop", &head_loop);
  m.def("head_chain", &head_chain);
  py::class_<Heads>(m, "Heads")
      .def(py::init<int, const std::vector<int64_t>&, const std::vector<double>&>())
      .def("run", &Heads::run)
      .def("run_plain", &Heads::run_plain);
  py::class_<mtmlk::PlainTensors>(m, "PlainTensors")
      .def(py::init<const py::capsule&, py::object, py::object, const py::object&>())
      .def("read", &mtmlk::PlainTensors::read)
      .def("addresses", &mtmlk::PlainTensors::addresses)
      .def("inner_loop", &mtmlk::PlainTensors::inner_loop)
      .def("divide", &mtmlk::PlainTensors::divide)
      .def("only_ones", &mtmlk::PlainTensors::only_ones);
  py::class_<LinearHeads>(m, "LinearHeads")
      .def(py::init<int, int64_t, int64_t, const std::vector<int64_t>&, const std::vector<double>&>())
      .def("stride", &LinearHeads::stride)
      .def("keep", &LinearHeads::keep)
      .def("back", &LinearHeads::back)
      .def("blocks", &LinearHeads::blocks);
  py::class_<Memory>(m, "Memory", py::buffer_protocol()).def(py::init<int64_t>()).def_buffer(&Memory::buffer);
  m.def("fma_peak", &mtmlk_fma_peak, py::call_guard<py::gil_scoped_release>());
  m.def("isa", &mtmlk_isa);
  m.def("isa_reason", &mtmlk_isa_reason);
  m.def("isa_available", &mtmlk_isa_available);
  m.def("native_seconds", [] { return native_seconds; });
}
