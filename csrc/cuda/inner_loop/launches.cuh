// The launches of the persistent inner loop, in one type of numbers. nvcc takes a minute for each type: every one is a file
// of its own, so that they compile side by side.
#pragma once

#include "cuda/inner_loop/interpreter.cuh"
#include "cuda/inner_loop/launches.h"
#include "cuda/inner_loop/task_sums.cuh"

namespace mtmlk {

constexpr int kThreadsOfASum = 256;

template <class T>
int run_schedule(const MtmlkSchedule& s, Stream stream) {
  ScheduleCall call = {};
  call.program = s.program, call.workspace = s.workspace, call.workspace_elements = s.workspace_elements;
  call.first_words = s.first_words, call.chip_elements = s.chip_elements, call.tasks = s.tasks;
  for (int i = 0; i < s.n_tensors; ++i) call.tensors[i] = {s.tensors[i], s.strides[i]};
  Launch launch;
  launch.grid = dim3(unsigned(s.blocks)), launch.block = dim3(unsigned(s.threads)), launch.stream = stream;
  launch.shared_bytes = shared_bytes(s.chip_elements, sizeof(T));
  return s.full ? start(inner_loop_kernel<T, kFullKernel>, launch, call)
                : start(inner_loop_kernel<T, kPlainKernel>, launch, call);
}

template <class T>
int sum_tasks(const MtmlkTaskSums& given, Stream stream) {
  TaskSums<T> s = {};
  s.parts = static_cast<const T*>(given.parts), s.scale = static_cast<const T*>(given.scale);
  s.elements = given.elements, s.tasks = given.tasks, s.n_results = given.n_results;
  for (int i = 0; i < given.n_results; ++i)
    s.results[i] = static_cast<T*>(given.results[i]), s.begins[i] = given.begins[i];
  Launch launch;
  launch.grid = dim3(unsigned((given.elements + kThreadsOfASum - 1) / kThreadsOfASum));
  launch.block = dim3(kThreadsOfASum), launch.stream = stream;
  return start(sum_over_tasks<T>, launch, s);
}

}  // namespace mtmlk
