// The persistent inner loop as one translation unit, for a library or a program on the CPU.
#include "cuda/inner_loop/in_double.cu"
#include "cuda/inner_loop/in_float.cu"

#include "cuda/inner_loop/api.cu"
