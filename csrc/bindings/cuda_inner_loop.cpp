// The persistent inner loop, in builds with CUDA. Tensors come as addresses; the caller keeps them alive and makes their
// device the current one.
#include "bindings/common.h"
#include "bindings/cuda_common.h"
#include "mtml/cuda_inner_loop.h"

namespace mtmlk {
namespace {

void* address(int64_t at) { return reinterpret_cast<void*>(at); }

// sizes: dtype, full, blocks, threads, first_words, chip_elements, workspace_elements.
void run_schedule(const std::array<int64_t, 7>& sizes, int64_t tasks, int64_t program, int64_t workspace,
                  const std::vector<int64_t>& tensors, const std::vector<int64_t>& strides, int64_t stream) {
  if (tensors.size() != strides.size()) throw std::invalid_argument("run_schedule: one stride a tensor");
  std::vector<void*> at(tensors.size());
  for (size_t i = 0; i < at.size(); ++i) at[i] = address(tensors[i]);
  MtmlkSchedule s = {};
  s.dtype = int32_t(sizes[0]), s.full = int32_t(sizes[1]), s.blocks = int32_t(sizes[2]), s.threads = int32_t(sizes[3]);
  s.first_words = int32_t(sizes[4]), s.chip_elements = int32_t(sizes[5]), s.workspace_elements = sizes[6];
  s.tasks = int32_t(tasks), s.program = static_cast<const int32_t*>(address(program)), s.workspace = address(workspace);
  s.n_tensors = int32_t(at.size()), s.tensors = at.data(), s.strides = strides.data();
  MtmlkReason reason = {};
  check_cuda(mtmlk_run_schedule(&s, address(stream), &reason), reason);
}

void sum_over_tasks(int32_t dtype, int32_t tasks, int64_t parts, int64_t scale, int64_t elements,
                    const std::vector<int64_t>& results, const std::vector<int64_t>& begins, int64_t stream) {
  constexpr size_t kMost = 192;
  if (results.size() != begins.size() || results.size() > kMost)
    throw std::invalid_argument("sum_over_tasks: at most 192 results, each with its beginning");
  std::array<void*, kMost> at;
  for (size_t i = 0; i < results.size(); ++i) at[i] = address(results[i]);
  MtmlkTaskSums s = {};
  s.dtype = dtype, s.tasks = tasks, s.parts = address(parts), s.scale = address(scale), s.elements = elements;
  s.n_results = int32_t(results.size()), s.results = at.data(), s.begins = begins.data();
  MtmlkReason reason = {};
  check_cuda(mtmlk_sum_over_tasks(&s, address(stream), &reason), reason);
}

}  // namespace

void bind_cuda_inner_loop(py::module_& m) {
  m.def("run_schedule", &run_schedule);
  m.def("sum_over_tasks", &sum_over_tasks);
  m.def("launches", [] {  // the functions themselves, for those who call them without Python
    return std::pair<Address, Address>(reinterpret_cast<Address>(&mtmlk_run_schedule),
                                       reinterpret_cast<Address>(&mtmlk_sum_over_tasks));
  });
}

}  // namespace mtmlk
