// The kernels of perceptrons of known widths as what a lane launches.
#include <cstring>
#include <memory>

#include "bindings/common.h"
#include "bindings/launch.h"
#include "mtml/cuda_mlp.h"

namespace mtmlk {
namespace {

template <class T>
T from_bytes(const py::bytes& bytes, const char* name) {
  if (size_t(PyBytes_GET_SIZE(bytes.ptr())) != sizeof(T))
    throw std::invalid_argument(std::string(name) + ": expected the bytes of the structure");
  T found;
  std::memcpy(&found, PyBytes_AS_STRING(bytes.ptr()), sizeof found);
  return found;
}

// tensors: W_1, b_1, W_2, .., the rate of each, inputs and targets of the support set and of the query set; then loss,
// output, support losses, and the tasks' gradients. The workspace is the history.
class MlpLaunch : public Launch {
 public:
  MlpLaunch(Address function, const py::bytes& launch, const py::bytes& call, size_t parameters)
      : function_(reinterpret_cast<Function>(function)),
        launch_(from_bytes<MtmlkMlpLaunch>(launch, "launch")),
        call_(from_bytes<MtmlkMlpCall>(call, "call")),
        parameters_(parameters) {
    if (parameters > MTMLK_MLP_TENSORS) throw std::invalid_argument("parameters: expected fewer");
  }

  int run(void* const* tensors, size_t count, void* workspace, void* stream, MtmlkReason* reason) const override {
    constexpr size_t kOthers = 9;  // data, results, shares, and no shares in float64
    if (count != 2 * parameters_ + kOthers) throw std::invalid_argument("MlpLaunch: other tensors than expected");
    MtmlkMlpCall c = call_;
    for (size_t i = 0; i < parameters_; ++i) c.theta[i] = tensors[i], c.rates[i] = tensors[parameters_ + i];
    void* const* const others = tensors + 2 * parameters_;
    c.support_x = others[0], c.support_y = others[1], c.query_x = others[2], c.query_y = others[3];
    c.loss = others[4], c.output = others[5], c.support_losses = others[6], c.parts = others[7];
    c.history = workspace;
    return function_(&launch_, &c, stream, reason);
  }

 private:
  using Function = int (*)(const MtmlkMlpLaunch*, const MtmlkMlpCall*, void*, MtmlkReason*);
  Function function_;
  MtmlkMlpLaunch launch_;
  MtmlkMlpCall call_;  // all but its addresses
  size_t parameters_;
};

// In place of the kernels: what is around them can then be timed.
int nothing_runs(const MtmlkMlpLaunch*, const MtmlkMlpCall*, void*, MtmlkReason*) { return MTMLK_CUDA_OK; }

}  // namespace

void bind_mlp_lane(py::module_& m) {
  using py::arg;
  m.def("no_mlp_launch", [] { return reinterpret_cast<Address>(&nothing_runs); });
  py::class_<MlpLaunch, Launch, std::shared_ptr<MlpLaunch>>(m, "MlpLaunch")
      .def(py::init<Address, const py::bytes&, const py::bytes&, size_t>(), py::kw_only(), arg("function"),
           arg("launch"), arg("call"), arg("parameters"));
}

}  // namespace mtmlk
