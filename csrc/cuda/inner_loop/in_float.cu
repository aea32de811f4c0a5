// The persistent inner loop in float.
#include "cuda/inner_loop/launches.cuh"

namespace mtmlk {

template int run_schedule<float>(const MtmlkSchedule&, Stream);
template int sum_tasks<float>(const MtmlkTaskSums&, Stream);

}  // namespace mtmlk
