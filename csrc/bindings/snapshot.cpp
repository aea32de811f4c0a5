// What stood in Python's dicts under names, and whether it still does: `mtml.paths.cache.Watch` asks before every call of a
// model. A hundred names take a microsecond here, and six where loops of Python's own compare them.
#include <memory>
#include <utility>

#include "bindings/lane_memory.h"

namespace mtmlk {
namespace {

// As the garbage collector sees it, an object that holds one tuple; all else points into that.
class Snapshot {
 public:
  // owners, keys, values: what each mapping has under each key. tables: dicts of which every name and value counts.
  // sized: mappings that have these `sizes`. tensors: of which dtype, shape, device and requires_grad do. typed: objects
  // whose types do.
  Snapshot(std::shared_ptr<CallTensors> reader, const py::list& owners, const py::list& keys, const py::list& values,
           const py::list& tables, const py::list& sized, std::vector<py::ssize_t> sizes, const py::list& tensors,
           const py::list& typed)
      : reader_(std::move(reader)),
        owners_(pointers(owners)),
        keys_(pointers(keys)),
        values_(pointers(values)),
        tables_(pointers(tables)),
        sized_(pointers(sized)),
        tensors_(pointers(tensors)),
        typed_(pointers(typed)),
        sizes_(std::move(sizes)) {
    if (sized_.size() != sizes_.size()) throw Malformed("sizes: expected one for each of `sized`");
    if (owners_.size() != keys_.size() || keys_.size() != values_.size())
      throw Malformed("pairs: expected as many owners, keys and values");
    py::list kept;
    for (const py::list& given : {owners, keys, values, tables, sized, tensors, typed})
      kept.append(py::tuple(given));  // a list might be changed
    for (PyObject* table : tables_) look_into(table, kept);
    for (PyObject* tensor : tensors_)
      if (!reader_->traits(tensor, traits_)) throw Malformed("tensors: expected plain ones");
    for (PyObject* object : typed_) {
      types_.push_back(reinterpret_cast<PyObject*>(Py_TYPE(object)));
      kept.append(py::handle(types_.back()));
    }
    kept_ = py::tuple(kept);
  }

  // Whether all of it is as it was.
  bool operator()() const {
    return kept_ && same_tables() && same_sizes() && same_pairs() && same_types() && same_tensors();
  }

  py::object kept_;  // for the garbage collector

 private:
  using Pointers = std::vector<PyObject*>;

  static Pointers pointers(const py::list& objects) {
    Pointers found;
    for (const py::handle object : objects) found.push_back(object.ptr());
    return found;
  }

  void look_into(PyObject* table, py::list& kept) {
    if (!PyDict_Check(table) || (PyDict_GET_SIZE(table) && !PyDict_CheckExact(table)))
      throw Malformed("tables: expected dicts, plain ones where there is something in them");  // others order it apart
    PyObject *name, *value;
    for (py::ssize_t at = 0; PyDict_Next(table, &at, &name, &value);) {
      names_.push_back(name), entries_.push_back(value);
      kept.append(py::handle(name)), kept.append(py::handle(value));
    }
    counts_.push_back(PyDict_GET_SIZE(table));
  }

  static py::ssize_t size_of(PyObject* mapping) {
    const py::ssize_t size = PyObject_Size(mapping);
    if (size < 0) throw py::error_already_set();
    return size;
  }

  bool same_tables() const {
    size_t n = 0;
    for (size_t i = 0; i < tables_.size(); ++i) {
      PyObject* const table = tables_[i];
      if (PyDict_GET_SIZE(table) != counts_[i]) return false;
      PyObject *name, *value;
      for (py::ssize_t at = 0; PyDict_Next(table, &at, &name, &value); ++n)
        if (value != entries_[n] || !equal(name, names_[n])) return false;
    }
    return true;
  }

  static bool equal(PyObject* a, PyObject* b) {
    const int found = PyObject_RichCompareBool(a, b, Py_EQ);  // quick where they are the same
    if (found < 0) throw py::error_already_set();
    return found;
  }

  bool same_sizes() const {
    for (size_t i = 0; i < sized_.size(); ++i)
      if (size_of(sized_[i]) != sizes_[i]) return false;
    return true;
  }

  bool same_pairs() const {
    for (size_t i = 0; i < owners_.size(); ++i)
      if (!stands(owners_[i], keys_[i], values_[i])) return false;
    return true;
  }

  static bool stands(PyObject* owner, PyObject* key, PyObject* value) {
    if (PyDict_CheckExact(owner)) {
      PyObject* const found = PyDict_GetItemWithError(owner, key);
      if (!found && PyErr_Occurred()) throw py::error_already_set();
      return found == value;
    }
    const py::object found = py::reinterpret_steal<py::object>(PyObject_GetItem(owner, key));
    if (found) return found.ptr() == value;
    if (!PyErr_ExceptionMatches(PyExc_KeyError)) throw py::error_already_set();
    PyErr_Clear();
    return false;
  }

  bool same_types() const {
    for (size_t i = 0; i < typed_.size(); ++i)
      if (reinterpret_cast<PyObject*>(Py_TYPE(typed_[i])) != types_[i]) return false;
    return true;
  }

  bool same_tensors() const {
    now_.clear();
    for (PyObject* tensor : tensors_)
      if (!reader_->traits(tensor, now_)) return false;
    return now_ == traits_;
  }

  std::shared_ptr<CallTensors> reader_;
  Pointers owners_, keys_, values_, tables_, names_, entries_, sized_, tensors_, typed_, types_;
  std::vector<py::ssize_t> sizes_, counts_;
  Shape traits_;
  mutable Shape now_;  // under the GIL
};

// Models hold what watches them: without this none of them would ever be freed.
void collectable(PyHeapTypeObject* heap) {
  PyTypeObject& type = heap->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (py::detail::is_holder_constructed(self)) Py_VISIT(py::cast<Snapshot&>(py::handle(self)).kept_.ptr());
    return 0;
  };
  type.tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) py::cast<Snapshot&>(py::handle(self)).kept_ = py::object();
    return 0;
  };
}

}  // namespace

void bind_snapshot(py::module_& m) {
  using py::arg;
  using List = const py::list&;
  py::class_<Snapshot>(m, "Snapshot", py::custom_type_setup(&collectable))
      .def(py::init<std::shared_ptr<CallTensors>, List, List, List, List, List, std::vector<py::ssize_t>, List, List>(),
           py::kw_only(), arg("reader"), arg("owners"), arg("keys"), arg("values"), arg("tables"), arg("sized"),
           arg("sizes"), arg("tensors"), arg("typed"))
      .def("__call__", &Snapshot::operator());
}

}  // namespace mtmlk
