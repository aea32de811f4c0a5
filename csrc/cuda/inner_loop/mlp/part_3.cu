// A part of the perceptrons' kernels in float: see list.cuh.
#include "cuda/inner_loop/mlp/part.cuh"

template int mtmlk::run_mlp_part<float, 3>(const MtmlkMlpLaunch&, const MtmlkMlpCall&, mtmlk::Stream);
