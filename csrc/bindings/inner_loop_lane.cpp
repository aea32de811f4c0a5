// Calls of `mtml::inner_loop` that are one launch: their tensors read, room made, the launch started, the results handed
// out, with no Python between. mtml_kernels/cuda/inner_loop/lane.py makes what is here, once for calls of equal form.
#include <cstddef>
#include <memory>

#include "bindings/cuda_common.h"
#include "bindings/lane_memory.h"
#include "bindings/launch.h"
#include "mtml/cuda_inner_loop.h"

namespace mtmlk {
namespace {

// A program of a thread block; sizes: dtype, full, blocks, threads, first_words, chip_elements, workspace_elements.
class ScheduleLaunch : public Launch {
 public:
  ScheduleLaunch(Address function, const std::array<int64_t, 7>& sizes, int64_t tasks, py::object words,
                 Address program, std::vector<int64_t> strides)
      : function_(reinterpret_cast<Function>(function)), words_(std::move(words)), strides_(std::move(strides)) {
    MtmlkSchedule& s = schedule_;
    s.dtype = int32_t(sizes[0]), s.full = int32_t(sizes[1]), s.blocks = int32_t(sizes[2]);
    s.threads = int32_t(sizes[3]), s.first_words = int32_t(sizes[4]), s.chip_elements = int32_t(sizes[5]);
    s.workspace_elements = sizes[6], s.tasks = int32_t(tasks), s.program = as<const int32_t>(program);
  }

  int run(void* const* tensors, size_t count, void* workspace, void* stream, MtmlkReason* reason) const override {
    if (schedule_.first_words == 0) return MTMLK_CUDA_OK;  // nothing to do
    if (count != strides_.size()) throw std::invalid_argument("ScheduleLaunch: one stride a tensor");
    MtmlkSchedule s = schedule_;
    s.workspace = workspace, s.n_tensors = int32_t(count), s.tensors = tensors, s.strides = strides_.data();
    return function_(&s, stream, reason);
  }

 private:
  using Function = int (*)(const MtmlkSchedule*, void*, MtmlkReason*);
  Function function_;
  MtmlkSchedule schedule_ = {};
  py::object words_;  // the tensor that is the program
  std::vector<int64_t> strides_;
};

// The way there: from addresses to (the outputs, the carry).
class LaneForward {
 public:
  // arguments: which of a call's addresses the kernel reads; those of `constants`, the same tensors in every call, stand
  // behind them. outputs: their shapes; written: which of them the kernel writes, the others have no elements. own:
  // shapes of gradients that each task has for itself. parts, numbers: elements of a task's shares of sums, in the dtype
  // of the call and in float64.
  LaneForward(const std::shared_ptr<Home>& home, std::shared_ptr<Launch> launch, int64_t tasks,
              std::vector<size_t> arguments, py::list constants, const std::vector<Shape>& outputs,
              std::vector<bool> written, const std::vector<Shape>& own, int64_t parts, int64_t numbers,
              int64_t workspace, py::object float64)
      : home_(home),
        launch_(std::move(launch)),
        arguments_(std::move(arguments)),
        constants_(std::move(constants)),
        outputs_(home, outputs, 16 * 1024),  // the losses of every step may be kept, and all else with them
        written_(std::move(written)),
        workspace_(workspace),
        float64_(std::move(float64)) {
    for (const Shape& shape : own) own_.emplace_back(home, std::vector<Shape>{shape}, kAny);
    if (parts) parts_.emplace_back(home, std::vector<Shape>{{tasks, parts}}, kAny);
    if (numbers) numbers_ = py::make_tuple(tasks, numbers);
    for (const py::handle t : constants_) fixed_.push_back(home->tensors->whole(t.ptr()).data);
  }

  py::tuple operator()(const py::bytes& addresses) const {
    std::vector<void*> tensors, at(outputs_.count());
    read(addresses, tensors);
    Room::Memory outputs;
    outputs_.make(outputs, at.data());
    for (size_t i = 0; i < written_.size(); ++i)
      if (written_[i]) tensors.push_back(at[i]);
    const py::tuple carry = make_carry(tensors);
    Room::Memory workspace;
    if (workspace_) workspace.piece = home_->allocated(workspace_);
    void* const room = workspace_ ? workspace.piece->view.data : nullptr;
    MtmlkReason reason = {};
    check_cuda(launch_->run(tensors.data(), tensors.size(), room, home_->stream(), &reason), reason);
    py::tuple found(outputs_.count());
    outputs_.hand_out(outputs, at.data(), found, 0);
    return py::make_tuple(found, carry);
  }

 private:
  static constexpr int64_t kAny = INT64_MAX;

  void read(const py::bytes& addresses, std::vector<void*>& tensors) const {
    const size_t known = size_t(PyBytes_GET_SIZE(addresses.ptr())) / sizeof(Address);
    const Address* const given = reinterpret_cast<const Address*>(PyBytes_AS_STRING(addresses.ptr()));
    tensors.reserve(arguments_.size() + written_.size() + own_.size() + 2);
    for (const size_t i : arguments_) {
      if (i >= known + fixed_.size()) throw std::invalid_argument("addresses: expected those of a call of this form");
      tensors.push_back(i < known ? as<void>(given[i]) : fixed_[i - known]);
    }
  }

  // (parts, numbers, own gradients), each in memory of its own: it goes with the graph, whoever keeps the outputs. To
  // the kernel own gradients come first, and absent shares too.
  py::tuple make_carry(std::vector<void*>& tensors) const {
    py::tuple carry(own_.size() + parts_.size() + size_t(bool(numbers_)));
    const size_t first = carry.size() - own_.size();
    for (size_t i = 0; i < own_.size(); ++i) tensors.push_back(put(own_[i], carry, first + i));
    tensors.push_back(parts_.empty() ? nullptr : put(parts_[0], carry, 0));
    tensors.push_back(nullptr);
    if (numbers_) {
      py::object made = home_->empty(numbers_, float64_);
      tensors.back() = home_->tensors->whole(made.ptr()).data;
      PyTuple_SET_ITEM(carry.ptr(), py::ssize_t(parts_.size()), made.release().ptr());
    }
    return carry;
  }

  static void* put(const Room& room, const py::tuple& carry, size_t at) {
    Room::Memory memory;
    void* data = nullptr;
    room.make(memory, &data);
    room.hand_out(memory, &data, carry, at);
    return data;
  }

  std::shared_ptr<Home> home_;
  std::shared_ptr<Launch> launch_;
  std::vector<size_t> arguments_;
  py::list constants_;
  std::vector<void*> fixed_;
  Room outputs_;
  std::vector<bool> written_;
  std::vector<Room> own_, parts_;  // of one tensor each; none or one of parts
  py::object numbers_;
  int64_t workspace_;
  py::object float64_;
};

// The way back from cotangents of the losses alone: sums over tasks of what the way there carried.
class LaneBackward {
 public:
  // begins: of all sums among a task's elements; wanted: which of them are gradients that the caller gets, of `shapes`.
  LaneBackward(std::shared_ptr<Home> home, Address function, int64_t tasks, int64_t elements,
               std::vector<int64_t> begins, std::vector<size_t> wanted, const std::vector<Shape>& shapes)
      : home_(std::move(home)),
        function_(reinterpret_cast<Function>(function)),
        begins_(std::move(begins)),
        wanted_(std::move(wanted)),
        room_(home_, shapes, 1024 * 1024) {
    if (wanted_.size() != shapes.size()) throw std::invalid_argument("wanted: expected one a shape");
    for (const size_t i : wanted_)
      if (i >= begins_.size()) throw std::invalid_argument("wanted: expected places in `begins`");
    sums_.dtype = home_->bits == 32 ? MTMLK_F32 : MTMLK_F64, sums_.tasks = int32_t(tasks), sums_.elements = elements;
  }

  // The gradients behind None for each of the Function's arguments that gets none. None alone where a cotangent is not
  // plain, or others than the first came.
  py::object operator()(const py::tuple& cotangents, const py::handle& parts) const {
    py::object scale = cotangents[0];
    for (size_t i = 1; i < cotangents.size(); ++i)
      if (!cotangents[i].is_none()) return py::none();
    TensorView weights, shares;
    if (!is_scale(scale, weights)) {
      if (scale.is_none()) return py::none();
      scale = scale.attr("contiguous")();  // that of a sum or a mean is one number for all tasks
      if (!is_scale(scale, weights)) return py::none();
    }
    if (!home_->tensors->look_at(parts.ptr(), home_->device_type, home_->device_index, home_->bits, shares) ||
        shares.ndim != 2 || shares.shape[0] != sums_.tasks || shares.shape[1] != sums_.elements)
      return py::none();
    std::vector<void*> at(room_.count()), results(begins_.size());
    Room::Memory memory;
    room_.make(memory, at.data());
    for (size_t i = 0; i < wanted_.size(); ++i) results[wanted_[i]] = at[i];
    MtmlkTaskSums s = sums_;
    s.parts = shares.data, s.scale = weights.data;
    s.n_results = int32_t(begins_.size()), s.results = results.data(), s.begins = begins_.data();
    MtmlkReason reason = {};
    check_cuda(function_(&s, home_->stream(), &reason), reason);
    py::tuple found(kLeading + room_.count());
    for (size_t i = 0; i < kLeading; ++i) PyTuple_SET_ITEM(found.ptr(), py::ssize_t(i), py::none().release().ptr());
    room_.hand_out(memory, at.data(), found, kLeading);
    return std::move(found);
  }

 private:
  using Function = int (*)(const MtmlkTaskSums*, void*, MtmlkReason*);
  static constexpr size_t kLeading = 3;  // of `_ByLane` in mtml_kernels/ops/inner_loop_lane.py

  bool is_scale(const py::object& t, TensorView& v) const {
    return home_->tensors->look_at(t.ptr(), home_->device_type, home_->device_index, home_->bits, v) && v.ndim == 1 &&
           v.shape[0] == sums_.tasks;
  }

  std::shared_ptr<Home> home_;
  Function function_;
  std::vector<int64_t> begins_;
  std::vector<size_t> wanted_;
  Room room_;
  MtmlkTaskSums sums_ = {};
};

// In place of the kernels: what is around them can then be timed.
int nothing_runs(const MtmlkSchedule*, void*, MtmlkReason*) { return MTMLK_CUDA_OK; }
int nothing_is_summed(const MtmlkTaskSums*, void*, MtmlkReason*) { return MTMLK_CUDA_OK; }

std::pair<Address, Address> no_launches() {
  return {reinterpret_cast<Address>(&nothing_runs), reinterpret_cast<Address>(&nothing_is_summed)};
}

}  // namespace

void bind_inner_loop_lane(py::module_& m) {
  using py::arg;
  py::class_<CallTensors, std::shared_ptr<CallTensors>>(m, "CallTensors")
      .def(py::init<const py::capsule&, py::object, py::object, const py::object&>())
      .def("read", &CallTensors::read);
  py::class_<Home, std::shared_ptr<Home>>(m, "Home").def(
      py::init([](std::shared_ptr<CallTensors> tensors, const py::object& dtype, const py::object& device, int bits,
                  bool cuda, int index) {
        const int type = cuda ? CallTensors::kCuda : CallTensors::kCpu;
        return Home{std::move(tensors), dtype, device, bits, type, index};
      }),
      py::kw_only(), arg("tensors"), arg("dtype"), arg("device"), arg("bits"), arg("cuda"), arg("index"));
  py::class_<Launch, std::shared_ptr<Launch>>(m, "Launch");
  py::class_<ScheduleLaunch, Launch, std::shared_ptr<ScheduleLaunch>>(m, "ScheduleLaunch")
      .def(py::init<Address, const std::array<int64_t, 7>&, int64_t, py::object, Address, std::vector<int64_t>>(),
           py::kw_only(), arg("function"), arg("sizes"), arg("tasks"), arg("words"), arg("program"), arg("strides"));
  py::class_<LaneForward>(m, "LaneForward")
      .def(py::init<const std::shared_ptr<Home>&, std::shared_ptr<Launch>, int64_t, std::vector<size_t>, py::list,
                    const std::vector<Shape>&, std::vector<bool>, const std::vector<Shape>&, int64_t, int64_t, int64_t,
                    py::object>(),
           py::kw_only(), arg("home"), arg("launch"), arg("tasks"), arg("arguments"), arg("constants"), arg("outputs"),
           arg("written"), arg("own"), arg("parts"), arg("numbers"), arg("workspace"), arg("float64"))
      .def("__call__", &LaneForward::operator());
  py::class_<LaneBackward>(m, "LaneBackward")
      .def(py::init<std::shared_ptr<Home>, Address, int64_t, int64_t, std::vector<int64_t>, std::vector<size_t>,
                    const std::vector<Shape>&>(),
           py::kw_only(), arg("home"), arg("function"), arg("tasks"), arg("elements"), arg("begins"), arg("wanted"),
           arg("shapes"))
      .def("__call__", &LaneBackward::operator());
  m.def("no_launches", &no_launches);
}

}  // namespace mtmlk
