// PyTorch's table of C functions that read and make tensors without a call of Python for each property.
//
// It is the exchange table of the DLPack standard, version 1: address, shape and dtype of a tensor take 30 ns by it, and
// ten times that from Python, which for 64 small heads is longer than their losses take. A tensor made of memory that is
// there takes a third of what a view does. The standard fixes the layout of what is declared here.
#pragma once

#include <atomic>
#include <cstring>
#include <utility>

#include "bindings/common.h"

namespace mtmlk {

struct TensorView {
  void* data;
  int32_t device_type, device;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ManagedTensor {
  uint32_t major, minor;
  void* owner;
  void (*release)(ManagedTensor*);
  uint64_t flags;
  TensorView view;
};

struct ExchangeTable {
  uint32_t major, minor;
  ExchangeTable* older;
  int (*allocate)(TensorView* like, ManagedTensor** made, void* context, void (*fail)(void*, const char*, const char*));
  void* share;
  int (*adopt)(ManagedTensor*, void** tensor);
  int (*view)(void* tensor, TensorView* out);
  int (*stream)(int32_t device_type, int32_t device, void** found);
};

// Memory that many tensors divide among themselves: it goes with the last of them. PyTorch reads what it is
// handed once, so that one description serves all of them in turn.
class Shared {
 public:
  // Of a tensor.
  Shared(py::object piece, const TensorView& like, size_t parts)
      : managed_{1, 0, this, &release, 0, like}, left_(parts), piece_(std::move(piece)) {}
  // Of memory as the table allocates it.
  Shared(ManagedTensor* piece, size_t parts)
      : managed_{1, 0, this, &release, 0, piece->view}, left_(parts), allocated_(piece) {}

  // Contiguous; `shape` and `strides` have to last until the tensor is made.
  ManagedTensor* part(void* data, int64_t* shape, int64_t* strides, size_t ndim) {
    TensorView& v = managed_.view;
    v.data = data, v.ndim = int32_t(ndim), v.shape = shape, v.strides = strides;
    return &managed_;
  }

 private:
  ~Shared() {
    if (allocated_) allocated_->release(allocated_);
  }

  // Tensors die on any thread, with or without the GIL, and after the interpreter has gone.
  static void release(ManagedTensor* part) {
    Shared* self = static_cast<Shared*>(part->owner);
    if (self->left_.fetch_sub(1) > 1) return;
    if (self->allocated_) {
      delete self;
    } else if (Py_IsInitialized()) {
      const py::gil_scoped_acquire gil;
      delete self;
    }
  }

  ManagedTensor managed_;
  std::atomic<size_t> left_;
  py::object piece_;
  ManagedTensor* allocated_ = nullptr;
};

inline void contiguous_strides(const int64_t* shape, size_t ndim, int64_t* strides) {
  int64_t size = 1;
  for (size_t d = ndim; d-- > 0;) strides[d] = size, size *= shape[d];
}

// A method without arguments of a class. Written in C, as PyTorch's are, its function is called directly: half the
// time.
class Method {
 public:
  Method(const py::object& type, const char* name)
      : name_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name))), descriptor_(type.attr(name)) {
    if (!PyObject_TypeCheck(descriptor_.ptr(), &PyMethodDescr_Type)) return;
    const PyMethodDef* def = reinterpret_cast<PyMethodDescrObject*>(descriptor_.ptr())->d_method;
    if (def->ml_flags == METH_NOARGS) function_ = def->ml_meth;
  }

  py::object operator()(PyObject* self) const {
    PyObject* found = function_ ? function_(self, nullptr) : PyObject_VectorcallMethod(name_.ptr(), &self, 1, nullptr);
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }

 private:
  py::object name_, descriptor_;
  PyCFunction function_ = nullptr;
};

// A property of a class, whose function, where it is written in C, is called directly.
class Property {
 public:
  Property(const py::object& type, const char* name)
      : name_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name))), descriptor_(type.attr(name)) {
    if (PyObject_TypeCheck(descriptor_.ptr(), &PyGetSetDescr_Type))
      found_ = reinterpret_cast<PyGetSetDescrObject*>(descriptor_.ptr())->d_getset;
  }

  py::object operator()(PyObject* self) const {
    PyObject* found = found_ ? found_->get(self, found_->closure) : PyObject_GetAttr(self, name_.ptr());
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }

 private:
  py::object name_, descriptor_;
  const PyGetSetDef* found_ = nullptr;
};

// Reads tensors of exactly PyTorch's own classes, with memory and nothing pending on their values.
class TensorReader {
 public:
  TensorReader(const py::capsule& table, py::object tensor, py::object parameter, const py::object& storage)
      : table_(static_cast<const ExchangeTable*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"))),
        tensor_(std::move(tensor)),
        parameter_(std::move(parameter)),
        requires_grad_(tensor_, "requires_grad"),
        is_neg_(tensor_, "is_neg"),
        untyped_storage_(tensor_, "untyped_storage"),
        storage_offset_(tensor_, "storage_offset"),
        nbytes_(storage, "nbytes") {
    if (!table_) throw py::error_already_set();
    while (table_ && table_->major != 1) table_ = table_->older;  // a newer PyTorch hands out this one too
  }

 protected:
  static constexpr int kCpu = 1, kCuda = 2, kInt = 0, kFloat = 2;

  // Of one of PyTorch's own classes, with memory.
  bool of_torch(PyObject* t, TensorView& v) const {
    const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(t));
    if (type != tensor_.ptr() && type != parameter_.ptr()) return false;
    if (table_->view(t, &v) == 0) return true;
    PyErr_Clear();  // no memory of its own: wrapped by a transform, sparse, on the meta device
    return false;
  }

  // Of one value or int64 an element, on any device; values still to be negated are not there yet.
  bool look(PyObject* t, TensorView& v) const {
    if (!of_torch(t, v)) return false;
    if (v.lanes != 1 || v.byte_offset != 0 || !v.data || (v.ndim && !v.strides)) return false;
    if (v.code == kInt) return v.bits == 64;
    if (v.code != kFloat || (v.bits != 32 && v.bits != 64)) return false;
    return is_neg_(t).ptr() == Py_False;
  }

  py::object adopted(ManagedTensor* part) const {
    void* tensor = nullptr;
    if (table_->adopt(part, &tensor) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor));
  }

  // Elements of a contiguous tensor, 0 where it is none or has none.
  static int64_t contiguous_size(const TensorView& v) {
    int64_t size = 1;
    for (int i = v.ndim - 1; i >= 0; --i) {
      if (v.shape[i] != 1 && v.strides[i] != size) return 0;
      size *= v.shape[i];
    }
    return size;
  }

  // Whether the storage behind a contiguous tensor has all its elements.
  bool holds(PyObject* t, int64_t size, int64_t itemsize) const {
    const int64_t bytes = size * itemsize;
    const py::object storage = untyped_storage_(t);
    const int64_t behind = PyLong_AsLongLong(nbytes_(storage.ptr()).ptr());
    if (behind < bytes) return false;
    return behind - bytes >= PyLong_AsLongLong(storage_offset_(t).ptr()) * itemsize;
  }

  // `holds`, asked once for a tensor at one address: a resized storage lies elsewhere.
  bool holds_still(PyObject* t, const void* data, int64_t size, int64_t itemsize) const {
    Known& known = known_[reinterpret_cast<uintptr_t>(t) / 64 % kKnown];
    if (known.data == data && known.bytes == size * itemsize && alive(known.reference) == t) return true;
    if (!holds(t, size, itemsize)) return false;
    known = {py::reinterpret_steal<py::object>(PyWeakref_NewRef(t, nullptr)), data, size * itemsize};
    if (!known.reference) throw py::error_already_set();
    return true;
  }

  bool requires_grad(PyObject* t) const { return requires_grad_(t).ptr() == Py_True; }

  template <class T>
  static py::bytes as_bytes(const std::vector<T>& v) {
    return py::bytes(reinterpret_cast<const char*>(v.data()), v.size() * sizeof(T));
  }

  const ExchangeTable* table_;

 private:
  struct Known {
    py::object reference;  // weak
    const void* data;
    int64_t bytes;
  };
  static constexpr size_t kKnown = 256;

  static PyObject* alive(const py::object& reference) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* found = nullptr;
    if (reference && PyWeakref_GetRef(reference.ptr(), &found) == 1) Py_DECREF(found);  // whoever asks holds another
    return found;
#else
    return reference ? PyWeakref_GET_OBJECT(reference.ptr()) : nullptr;
#endif
  }

  mutable Known known_[kKnown] = {};  // by address; under the GIL
  py::object tensor_, parameter_;
  Property requires_grad_;
  Method is_neg_, untyped_storage_, storage_offset_, nbytes_;
};

}  // namespace mtmlk
