// `linear_multihead_loss`: linear heads with their losses.
#include "bindings/common.h"

namespace mtmlk {
namespace {

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
           MtmlkHeadError{});
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

  int dtype_;
  int64_t rows_, features_, columns_ = 0;
  std::vector<MtmlkHead> heads_;
};

}  // namespace

void bind_linear_multihead_loss(py::module_& m) {
  py::class_<LinearHeads>(m, "LinearHeads")
      .def(py::init<int, int64_t, int64_t, const std::vector<int64_t>&, const std::vector<double>&>())
      .def("stride", &LinearHeads::stride)
      .def("keep", &LinearHeads::keep)
      .def("back", &LinearHeads::back)
      .def("blocks", &LinearHeads::blocks);
}

}  // namespace mtmlk
