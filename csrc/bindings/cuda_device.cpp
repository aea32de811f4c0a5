// The GPUs of this machine, in builds with CUDA.
#include "bindings/common.h"
#include "bindings/cuda_common.h"
#include "mtml/cuda_device.h"

namespace mtmlk {
namespace {

// (driver's, ours), as mtmlk_cuda_versions has them.
std::pair<int32_t, int32_t> versions() {
  int32_t driver = 0, runtime = 0;
  MtmlkReason reason = {};
  check_cuda(mtmlk_cuda_versions(&driver, &runtime, &reason), reason);
  return {driver, runtime};
}

std::vector<MtmlkCudaDevice> devices() {
  int32_t count = 0;
  MtmlkReason reason = {};
  check_cuda(mtmlk_cuda_device_count(&count, &reason), reason);
  std::vector<MtmlkCudaDevice> found(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) check_cuda(mtmlk_cuda_device(i, &found[size_t(i)], &reason), reason);
  return found;
}

int32_t probe(int32_t index) {
  int32_t architecture = 0;
  MtmlkReason reason = {};
  int status;
  {
    const py::gil_scoped_release release;
    status = mtmlk_cuda_probe(index, &architecture, &reason);
  }
  check_cuda(status, reason);
  return architecture;
}

}  // namespace

void bind_cuda_device(py::module_& m) {
  using Device = MtmlkCudaDevice;
  py::register_exception<NoDeviceCode>(m, "NoDeviceCode", PyExc_RuntimeError);
  py::class_<Device>(m, "CudaDevice")
      .def_property_readonly("name", [](const Device& d) { return std::string(d.name); })
      .def_property_readonly("capability", [](const Device& d) { return std::make_pair(d.major, d.minor); })
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("shared_bytes", &Device::shared_bytes)
      .def_readonly("memory_bytes", &Device::memory_bytes);
  m.attr("cuda_archs") = MTMLK_CUDA_ARCHS;
  m.def("cuda_versions", &versions);
  m.def("cuda_devices", &devices);
  m.def("cuda_probe", &probe);
}

}  // namespace mtmlk
