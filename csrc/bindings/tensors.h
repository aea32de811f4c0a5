// Tensors on their way into the CPU engine and out of it. Included in module.cpp only.
#pragma once

#include "bindings/exchange.h"
#include "bindings/inner_loop_inputs.h"

namespace mtmlk {

// Reads plain tensors: of exactly PyTorch's own classes, on the CPU, dense, with nothing pending on their values.
class PlainTensors : public TensorReader {
 public:
  using TensorReader::TensorReader;

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
      if (form.back() != kIds && requires_grad(t.ptr())) return py::none();
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
    std::vector<int64_t> numbers = from_bytes(form), strides(numbers.size());
    const size_t parts = size_t(numbers.at(0));
    Shared* shared = new Shared(piece, whole, parts);
    py::list tensors(parts);
    char* data = static_cast<char*>(whole.data);
    for (size_t i = 0, at = kShapes; i < parts; ++i) {
      int64_t* const shape = numbers.data() + at;
      int64_t bytes = whole.bits / 8;
      for (; numbers.at(at) >= 0; ++at) bytes *= numbers[at];
      const size_t ndim = size_t(numbers.data() + at - shape);
      contiguous_strides(shape, ndim, strides.data());
      py::object tensor = adopted(shared->part(data, shape, strides.data(), ndim));
      PyList_SET_ITEM(tensors.ptr(), py::ssize_t(i), tensor.release().ptr());
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
  // A form: how many logits, the bits of a value, then of every tensor its shape and one of the two that end it.
  static constexpr int64_t kIds = -1, kValues = -2;
  static constexpr size_t kShapes = 2;

  static std::vector<int64_t> from_bytes(const py::bytes& b) {
    std::vector<int64_t> v(size_t(PyBytes_GET_SIZE(b.ptr())) / sizeof(int64_t));
    std::memcpy(v.data(), PyBytes_AS_STRING(b.ptr()), v.size() * sizeof(int64_t));
    return v;
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

  bool view(PyObject* t, TensorView& v) const { return look(t, v) && v.device_type == kCpu; }

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
};

}  // namespace mtmlk
