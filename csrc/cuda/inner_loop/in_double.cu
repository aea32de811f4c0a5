// The persistent inner loop in double.
#include "cuda/inner_loop/launches.cuh"

namespace mtmlk {

template int run_schedule<double>(const MtmlkSchedule&, Stream);
template int sum_tasks<double>(const MtmlkTaskSums&, Stream);

}  // namespace mtmlk
