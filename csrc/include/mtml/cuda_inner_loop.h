// The C ABI of the persistent inner loop: raw pointers on the current device, sizes, and a MtmlkCudaStatus.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/cuda_device.h"

#ifdef __cplusplus
extern "C" {
#endif

// A program of a thread block (program.h) and what it works on.
typedef struct {
  int32_t dtype;  // MtmlkDtype
  int32_t full;   // whether the program has instructions that only the full kernel knows
  int32_t tasks, blocks, threads;
  const int32_t* program;      // on the device, aligned to 16 bytes
  int32_t first_words;         // of its first phase
  int32_t chip_elements;       // of a task's planes on the chip
  int64_t workspace_elements;  // of each block
  void* workspace;             // [blocks, workspace_elements]
  int32_t n_tensors;
  void* const* tensors;
  const int64_t* strides;  // elements from one task to the next, 0 where all share
} MtmlkSchedule;

MTMLK_API int64_t mtmlk_schedule_shared_bytes(int32_t dtype, int32_t chip_elements);  // of a block
MTMLK_API int mtmlk_run_schedule(const MtmlkSchedule* schedule, void* stream, MtmlkReason* reason);

// Elements of a task's parts, cut into results: out of result i is e - begins[i] for begins[i] <= e < begins[i + 1].
typedef struct {
  int32_t dtype, tasks;
  const void* parts;  // [T, elements]
  const void* scale;  // [T]; NULL: 1
  int64_t elements;
  int32_t n_results;
  void* const* results;   // NULL where nobody wants it
  const int64_t* begins;  // from 0 up
} MtmlkTaskSums;

// results = sum over tasks, in their order, of scale[t] parts[t]
MTMLK_API int mtmlk_sum_over_tasks(const MtmlkTaskSums* sums, void* stream, MtmlkReason* reason);

#ifdef __cplusplus
}
#endif
