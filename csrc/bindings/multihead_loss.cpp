// `mtml::multihead_loss`: the losses of heads and their gradients.
#include <cstring>

#include "bindings/common.h"

namespace mtmlk {
namespace {

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
    finish(status, error);
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

}  // namespace

void bind_multihead_loss(py::module_& m) {
  py::class_<Heads>(m, "Heads")
      .def(py::init<int, const std::vector<int64_t>&, const std::vector<double>&>())
      .def("run", &Heads::run)
      .def("run_plain", &Heads::run_plain);
}

}  // namespace mtmlk
