// Tensors read without a call of Python for each property. Included in module.cpp only.
//
// PyTorch hands out a table of C functions, the exchange table of the DLPack standard, version 1: address, shape and
// dtype of a tensor take 30 ns by it, and ten times that from Python, which for 64 small heads is longer than their
// losses take. A tensor made of memory that is there takes a third of what a view does. The standard fixes the layout
// of what is declared here.
#pragma once

#include <atomic>
#include <cstring>
#include <utility>

#include "bindings/inner_loop_inputs.h"

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
  void *allocate, *share;
  int (*adopt)(ManagedTensor*, void** tensor);
  int (*view)(void* tensor, TensorView* out);
  void* stream;
};

// Memory of one tensor that many others divide among themselves: it goes with the last of them.
class Shared {
 public:
  struct Part {
    ManagedTensor managed;
    std::vector<int64_t> shape, strides;
  };

  Shared(py::object piece, size_t parts) : parts_(parts), left_(parts), piece_(std::move(piece)) {}

  ManagedTensor* part(size_t i, const TensorView& like, void* data, const int64_t* shape, int ndim) {
    Part& p = parts_[i];
    p.shape.assign(shape, shape + ndim), p.strides.resize(size_t(ndim));
    int64_t size = 1;
    for (size_t d = size_t(ndim); d-- > 0;) p.strides[d] = size, size *= p.shape[d];
    p.managed = {1, 0, this, &release, 0, like};
    TensorView& v = p.managed.view;
    v.data = data, v.ndim = ndim, v.shape = p.shape.data(), v.strides = p.strides.data();
    return &p.managed;
  }

  // Tensors die on any thread, with or without the GIL, and after the interpreter has gone.
  static void release(ManagedTensor* part) {
    Shared* self = static_cast<Shared*>(part->owner);
    if (self->left_.fetch_sub(1) > 1 || !Py_IsInitialized()) return;
    const py::gil_scoped_acquire gil;
    delete self;
  }

 private:
  std::vector<Part> parts_;
  std::atomic<size_t> left_;
  py::object piece_;
};

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

// Reads plain tensors: of exactly PyTorch's own classes, on the CPU, dense, with nothing pending on their values.
class PlainTensors {
 public:
  PlainTensors(const py::capsule& table, py::object tensor, py::object parameter, const py::object& storage)
      : table_(static_cast<const ExchangeTable*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"))),
        tensor_(std::move(tensor)),
        parameter_(std::move(parameter)),
        requires_grad_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString("requires_grad"))),
        is_neg_(tensor_, "is_neg"),
        untyped_storage_(tensor_, "untyped_storage"),
        storage_offset_(tensor_, "storage_offset"),
        nbytes_(storage, "nbytes") {
    if (!table_) throw py::error_already_set();
    while (table_ && table_->major != 1) table_ = table_->older;  // a newer PyTorch hands out this one too
  }

  // Of contiguous logits of one dtype and contiguous targets, class ids or constants of that dtype: (the form: all that
  // is checked of them; the addresses). None where one is something else, or not plain.
  py::object read(const py::list& logits, const py::list& targets) const {
    if (!table_) return py::none();
    std::vector<int64_t> form = {int64_t(logits.size())};
    Addresses addresses;
    form.reserve(size_t(4 * (logits.size() + targets.size())));
    int bits = 0;
    for (const py::handle t : logits) {
      if (!add(t.ptr(), bits, form, addresses)) return py::none();
      if (form.back() == kIds) return py::none();
    }
    for (const py::handle t : targets) {
      if (!add(t.ptr(), bits, form, addresses)) return py::none();
      if (form.back() != kIds && is_true(t.ptr(), requires_grad_)) return py::none();
    }
    return py::make_tuple(as_bytes(form), as_bytes(addresses));
  }

  // The addresses of contiguous tensors, 0 for None: of floats of `bits` (0: none), and of class ids where `ids`. None
  // where one is not plain, or its storage does not hold all of it (resized since, as FSDP does): that needs a closer
  // look.
  py::object addresses(const py::sequence& tensors, int bits, bool ids) const {
    Addresses found;
    return table_ && list_at(tensors, bits, ids, false, found) ? py::cast(found) : py::none();
  }

  // The same of what an inner loop reads, as `InnerLoopInputs`; `*_ids`: the targets are class ids; `inputs_of_ids`:
  // positions in support_x and query_x.
  py::object inner_loop(const py::sequence& params, const py::sequence& support_x, const py::object& support_y,
                        const py::sequence& query_x, const py::object& query_y, const py::object& support_mask,
                        const py::object& query_mask, const py::sequence& lr, const py::object& step_weights, int bits,
                        bool support_ids, bool query_ids, const py::tuple& inputs_of_ids) const {
    InnerLoopInputs in;
    const bool plain = table_ && list_at(params, bits, false, true, in.params) &&
                       inputs_at(support_x, bits, inputs_of_ids, in.support_x) &&
                       inputs_at(query_x, bits, inputs_of_ids, in.query_x) && list_at(lr, bits, false, true, in.lr) &&
                       one_at(support_y, support_ids ? 0 : bits, support_ids, false, in.support_y) &&
                       one_at(query_y, query_ids ? 0 : bits, query_ids, false, in.query_y) &&
                       one_at(support_mask, bits, false, false, in.support_mask) &&
                       one_at(query_mask, bits, false, false, in.query_mask) &&
                       one_at(step_weights, bits, false, false, in.step_weights);
    return plain ? py::cast(std::move(in)) : py::none();
  }

  // Tensors of the logits' shapes (from their form) that lie in `piece`, a plain one, one after another.
  py::list divide(const py::object& piece, const py::bytes& form) const {
    TensorView whole;
    if (!view(piece.ptr(), whole)) throw py::value_error("piece: expected a plain tensor");
    const std::vector<int64_t> numbers = from_bytes(form);
    const size_t parts = size_t(numbers.at(0));
    Shared* shared = new Shared(piece, parts);
    py::list tensors(parts);
    char* data = static_cast<char*>(whole.data);
    for (size_t i = 0, at = kShapes; i < parts; ++i) {
      const size_t first = at;
      int64_t bytes = whole.bits / 8;
      for (; numbers.at(at) >= 0; ++at) bytes *= numbers[at];
      void* tensor = nullptr;
      ManagedTensor* part = shared->part(i, whole, data, numbers.data() + first, int(at - first));
      if (table_->adopt(part, &tensor) != 0) throw py::error_already_set();
      PyList_SET_ITEM(tensors.ptr(), py::ssize_t(i), static_cast<PyObject*>(tensor));
      data += bytes, ++at;
    }
    return tensors;
  }

  // Whether a tensor [n] is plain and holds nothing but ones.
  bool only_ones(const py::handle t) const {
    TensorView v;
    if (!view(t.ptr(), v) || v.code != kFloat || v.ndim != 1) return false;
    bool ones = true;
    for (int64_t i = 0; i < v.shape[0] && ones; ++i)
      ones = v.bits == 32 ? static_cast<const float*>(v.data)[i * v.strides[0]] == 1
                          : static_cast<const double*>(v.data)[i * v.strides[0]] == 1;
    return ones;
  }

 private:
  static constexpr int kCpu = 1, kInt = 0, kFloat = 2;
  // A form: how many logits, the bits of a value, then of every tensor its shape and one of the two that end it.
  static constexpr int64_t kIds = -1, kValues = -2;
  static constexpr size_t kShapes = 2;

  template <class T>
  static py::bytes as_bytes(const std::vector<T>& v) {
    return py::bytes(reinterpret_cast<const char*>(v.data()), v.size() * sizeof(T));
  }

  static std::vector<int64_t> from_bytes(const py::bytes& b) {
    std::vector<int64_t> v(size_t(PyBytes_GET_SIZE(b.ptr())) / sizeof(int64_t));
    std::memcpy(v.data(), PyBytes_AS_STRING(b.ptr()), v.size() * sizeof(int64_t));
    return v;
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

  // False where a closer look is needed. Tensors that come again in every call are `known`.
  bool one_at(const py::handle t, int bits, bool ids, bool known, Address& at) const {
    TensorView v = {};
    if (!t.is_none()) {
      if (!view(t.ptr(), v) || !(v.code == kInt ? ids : v.bits == bits)) return false;
      const int64_t size = contiguous_size(v), itemsize = v.bits / 8;
      if (size == 0 || !(known ? holds_still(t.ptr(), v.data, size, itemsize) : holds(t.ptr(), size, itemsize)))
        return false;
    }
    at = reinterpret_cast<Address>(v.data);
    return true;
  }

  bool list_at(const py::sequence& tensors, int bits, bool ids, bool known, Addresses& found) const {
    const py::object fast = py::reinterpret_steal<py::object>(PySequence_Fast(tensors.ptr(), "expected a sequence"));
    if (!fast) throw py::error_already_set();
    const py::ssize_t n = PySequence_Fast_GET_SIZE(fast.ptr());
    found.resize(size_t(n));
    for (py::ssize_t i = 0; i < n; ++i)
      if (!one_at(PySequence_Fast_GET_ITEM(fast.ptr(), i), bits, ids, known, found[size_t(i)])) return false;
    return true;
  }

  bool inputs_at(const py::sequence& tensors, int bits, const py::tuple& of_ids, Addresses& found) const {
    if (PyTuple_GET_SIZE(of_ids.ptr()) == 0) return list_at(tensors, bits, false, false, found);
    for (const py::handle t : tensors) {
      const bool ids = of_ids.contains(found.size());
      found.push_back(0);
      if (!one_at(t, ids ? 0 : bits, ids, false, found.back())) return false;
    }
    return true;
  }

  static PyObject* alive(const py::object& reference) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* found = nullptr;
    if (reference && PyWeakref_GetRef(reference.ptr(), &found) == 1) Py_DECREF(found);  // whoever asks holds another
    return found;
#else
    return reference ? PyWeakref_GET_OBJECT(reference.ptr()) : nullptr;
#endif
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

  // Whether the storage behind a contiguous tensor has all its elements.
  bool holds(PyObject* t, int64_t size, int64_t itemsize) const {
    const int64_t bytes = size * itemsize;
    const py::object storage = untyped_storage_(t);
    const int64_t behind = PyLong_AsLongLong(nbytes_(storage.ptr()).ptr());
    if (behind < bytes) return false;
    return behind - bytes >= PyLong_AsLongLong(storage_offset_(t).ptr()) * itemsize;
  }

  static bool is_true(PyObject* t, const py::object& name) {
    const py::object found = py::reinterpret_steal<py::object>(PyObject_GetAttr(t, name.ptr()));
    if (!found) throw py::error_already_set();
    return found.ptr() == Py_True;
  }

  bool view(PyObject* t, TensorView& v) const {
    const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(t));
    if (type != tensor_.ptr() && type != parameter_.ptr()) return false;
    if (table_->view(t, &v) != 0) {  // no memory of its own: wrapped by a transform, sparse, on the meta device
      PyErr_Clear();
      return false;
    }
    if (v.device_type != kCpu || v.lanes != 1 || v.byte_offset != 0 || !v.data || (v.ndim && !v.strides)) return false;
    if (v.code == kInt) return v.bits == 64;
    if (v.code != kFloat || (v.bits != 32 && v.bits != 64)) return false;
    return is_neg_(t).ptr() == Py_False;  // else values still to be negated
  }

  // `bits`: those of the first values, which all others must have.
  bool add(PyObject* t, int& bits, std::vector<int64_t>& form, Addresses& addresses) const {
    TensorView v;
    if (!view(t, v)) return false;
    const int64_t size = contiguous_size(v);
    if (size == 0 || !holds(t, size, v.bits / 8)) return false;
    if (v.code == kFloat && bits == 0) form.push_back(bits = v.bits);
    if (v.code == kFloat && v.bits != bits) return false;
    form.insert(form.end(), v.shape, v.shape + v.ndim);
    form.push_back(v.code == kInt ? kIds : kValues);
    addresses.push_back(reinterpret_cast<Address>(v.data));
    return true;
  }

  struct Known {
    py::object reference;  // weak
    const void* data;
    int64_t bytes;
  };
  static constexpr size_t kKnown = 256;

  const ExchangeTable* table_;
  mutable Known known_[kKnown] = {};  // by address; under the GIL
  py::object tensor_, parameter_, requires_grad_;
  Method is_neg_, untyped_storage_, storage_offset_, nbytes_;
};

}  // namespace mtmlk
