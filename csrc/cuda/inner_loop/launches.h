// What api.cu starts; defined for float and double in files of their own.
#pragma once

#include "cuda/inner_loop/program.h"
#include "cuda/launch.h"
#include "mtml/cuda_inner_loop.h"

namespace mtmlk {

inline size_t shared_bytes(int32_t chip_elements, size_t element) {
  SharedCarver carver;
  carver.take<int32_t>(2 * kPhaseWords);
  if (element == 4)
    carver.take<float>(size_t(chip_elements));
  else
    carver.take<double>(size_t(chip_elements));
  return carver.bytes();
}

template <class T>
int run_schedule(const MtmlkSchedule& s, Stream stream);

template <class T>
int sum_tasks(const MtmlkTaskSums& given, Stream stream);

}  // namespace mtmlk
