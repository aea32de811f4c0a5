// What lanes share: a call's tensors read in one go, and room made for its results. Included by the lanes' files.
#pragma once

#include <memory>
#include <utility>

#include "bindings/exchange.h"

namespace mtmlk {

using Shape = std::vector<int64_t>;

inline int64_t elements_of(const Shape& shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

class CallTensors : public TensorReader {
 public:
  using TensorReader::adopted;
  using TensorReader::kCpu;
  using TensorReader::kCuda;
  using TensorReader::kFloat;
  using TensorReader::TensorReader;

  // Of tensors, None and lists of such: (the form, all that is looked at; the addresses, 0 for None). None where one is
  // no plain contiguous tensor, or its storage does not hold all of it: that needs a closer look.
  py::object read(const py::args& groups) const {
    Shape form;
    Addresses addresses;
    form.reserve(96), addresses.reserve(24);
    if (!table_) return py::none();
    for (size_t i = 0; i < groups.size(); ++i) {
      PyObject* const group = PyTuple_GET_ITEM(groups.ptr(), py::ssize_t(i));
      const bool list = PyList_CheckExact(group) || PyTuple_CheckExact(group);
      const bool known = i < kKnownGroups;
      if (!(list ? add_all(group, known, form, addresses) : add(group, known, form, addresses))) return py::none();
    }
    return py::make_tuple(as_bytes(form), as_bytes(addresses));
  }

  // Adds dtype, device, requires_grad and shape; false where a tensor is of another class, or not in memory.
  bool traits(PyObject* t, Shape& found) const {
    TensorView v;
    if (!table_ || !of_torch(t, v)) return false;
    found.push_back(traits_of(t, v));
    found.insert(found.end(), v.shape, v.shape + v.ndim);
    return true;
  }

  // A plain contiguous tensor of these values on this device, else nothing.
  bool look_at(PyObject* t, int device_type, int device, int bits, TensorView& v) const {
    return look(t, v) && v.code == kFloat && v.bits == bits && v.device_type == device_type && v.device == device &&
           contiguous_size(v) > 0;
  }

  // Values [size] of the CPU in a row of any stride, each there (views of a freed storage lie at their offset from null).
  bool look_along(PyObject* t, int64_t size, int bits, TensorView& v) const {
    constexpr uintptr_t kLow = uintptr_t(1) << 36;
    return look(t, v) && v.code == kFloat && v.bits == bits && v.device_type == kCpu && v.ndim == 1 &&
           v.shape[0] == size && reinterpret_cast<uintptr_t>(v.data) >= kLow;
  }

  // Of one that PyTorch has just made, or that lies where it did when it was read.
  TensorView whole(PyObject* t) const {
    TensorView v;
    if (table_->view(t, &v) != 0) throw py::error_already_set();
    return v;
  }

  // Nothing where there is no memory.
  ManagedTensor* allocated(TensorView like) const {
    ManagedTensor* made = nullptr;
    return table_->allocate(&like, &made, nullptr, [](void*, const char*, const char*) {}) == 0 ? made : nullptr;
  }

  void* stream(int device_type, int device) const {
    void* found = nullptr;
    if (device_type == kCuda && table_->stream(device_type, device, &found) != 0) throw py::error_already_set();
    return found;
  }

 private:
  // In a form: the length of a list as kList - length, and for a tensor its kind, then its shape.
  static constexpr int64_t kAbsent = -1, kList = -2;
  static constexpr size_t kKnownGroups = 2;  // parameters and rates come again in every call

  int64_t traits_of(PyObject* t, const TensorView& v) const {
    return int64_t(v.ndim) | int64_t(v.code) << 8 | int64_t(v.bits) << 16 | int64_t(requires_grad(t)) << 24 |
           int64_t(v.device_type) << 32 | int64_t(v.device) << 48;
  }

  bool add_all(PyObject* list, bool known, Shape& form, Addresses& addresses) const {
    const py::ssize_t n = PySequence_Fast_GET_SIZE(list);
    form.push_back(kList - n);
    for (py::ssize_t i = 0; i < n; ++i)
      if (!add(PySequence_Fast_GET_ITEM(list, i), known, form, addresses)) return false;
    return true;
  }

  bool add(PyObject* t, bool known, Shape& form, Addresses& addresses) const {
    TensorView v = {};
    if (t == Py_None) {
      form.push_back(kAbsent);
    } else {
      if (!look(t, v)) return false;
      const int64_t size = contiguous_size(v), itemsize = v.bits / 8;
      if (size == 0 || !(known ? holds_still(t, v.data, size, itemsize) : holds(t, size, itemsize))) return false;
      form.push_back(traits_of(t, v));
      form.insert(form.end(), v.shape, v.shape + v.ndim);
    }
    addresses.push_back(reinterpret_cast<Address>(v.data));
    return true;
  }
};

// Where the tensors of a call lie, of which dtype they are, and who reads them.
struct Home {
  std::shared_ptr<CallTensors> tensors;
  py::object dtype, device;
  int bits, device_type, device_index;

  // A new tensor. PyTorch's function is looked up each time: tests put another in its place.
  py::object empty(const py::object& size, const py::object& of) const {
    static PyObject* const names = Py_BuildValue("(ss)", "dtype", "device");
    static PyObject* const torch = PyImport_ImportModule("torch");
    static PyObject* const name = PyUnicode_InternFromString("empty");
    const py::object make = py::reinterpret_steal<py::object>(PyObject_GetAttr(torch, name));
    PyObject* arguments[] = {size.ptr(), of.ptr(), device.ptr()};
    PyObject* found = make ? PyObject_Vectorcall(make.ptr(), arguments, 1, names) : nullptr;
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }

  // New memory, by the same allocator, without a tensor around it: half the time.
  ManagedTensor* allocated(int64_t elements) const {
    if (ManagedTensor* made = tensors->allocated(
            {nullptr, device_type, device_index, 1, CallTensors::kFloat, uint8_t(bits), 1, &elements, nullptr, 0}))
      return made;
    empty(py::int_(elements), dtype);  // raises what PyTorch raises where there is no memory
    throw std::bad_alloc();
  }

  void* stream() const { return tensors->stream(device_type, device_index); }
};

// Room for some tensors of a call: in one piece of memory, which goes with the last of them, up to so many bytes.
class Room {
 public:
  Room(std::shared_ptr<Home> home, const std::vector<Shape>& shapes, int64_t together)
      : home_(std::move(home)), shapes_(shapes) {
    for (const Shape& shape : shapes) {
      begins_.push_back(elements_);
      elements_ += (elements_of(shape) + kAligned - 1) / kAligned * kAligned;
      sizes_.push_back(py::tuple(py::cast(shape)));
      strides_.emplace_back(shape.size());
      contiguous_strides(shape.data(), shape.size(), strides_.back().data());
    }
    together_ = elements_ > 0 && elements_ * home_->bits / 8 <= together;
  }

  size_t count() const { return shapes_.size(); }

  // What has been allocated for a call: one piece, or a tensor for each.
  struct Memory {
    ManagedTensor* piece = nullptr;
    std::vector<py::object> tensors;
    Memory() = default;
    Memory(const Memory&) = delete;
    ~Memory() {
      if (piece) piece->release(piece);
    }
  };

  // Where each tensor lies.
  void make(Memory& memory, void** at) const {
    if (together_) {
      memory.piece = home_->allocated(elements_);
      char* const data = static_cast<char*>(memory.piece->view.data);
      for (size_t i = 0; i < count(); ++i) at[i] = data + begins_[i] * (home_->bits / 8);
      return;
    }
    for (size_t i = 0; i < count(); ++i) {
      memory.tensors.push_back(home_->empty(sizes_[i], home_->dtype));
      at[i] = home_->tensors->whole(memory.tensors[i].ptr()).data;
    }
  }

  // The tensors, into a new tuple from `first` on.
  void hand_out(Memory& memory, void* const* at, const py::tuple& target, size_t first) const {
    Shared* const shared = together_ ? new Shared(std::exchange(memory.piece, nullptr), count()) : nullptr;
    for (size_t i = 0; i < count(); ++i) {
      py::object tensor =
          shared
              ? home_->tensors->adopted(shared->part(at[i], shapes_[i].data(), strides_[i].data(), shapes_[i].size()))
              : std::move(memory.tensors[i]);
      PyTuple_SET_ITEM(target.ptr(), py::ssize_t(first + i), tensor.release().ptr());
    }
  }

 private:
  static constexpr int64_t kAligned = 64;  // elements: 256 bytes or more, as PyTorch's own memory is

  std::shared_ptr<Home> home_;
  mutable std::vector<Shape> shapes_, strides_;  // never written: the exchange table has no const
  std::vector<int64_t> begins_;
  std::vector<py::object> sizes_;
  int64_t elements_ = 0;
  bool together_;
};

}  // namespace mtmlk
