// The C ABI of the inner loop of multi-layer perceptrons of known widths: raw pointers on the current device, sizes, and
// a MtmlkCudaStatus.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/cuda_device.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MTMLK_MLP_LAYERS = 4, MTMLK_MLP_TENSORS = 2 * MTMLK_MLP_LAYERS };

// A set's loss: weight times the sum of the losses of all elements.
typedef struct {
  int32_t kind;  // LossKind, one of an element
  double p0, weight;
} MtmlkMlpLoss;

typedef struct {
  int32_t tasks, support, query, steps;
  int32_t first_order, wants_gradient, wants_rates;
  int32_t act;    // Act
  int32_t sets;   // how many steps' values lie on the chip: 2 where there is room, else 1
  double c0, c1;  // of the activation
  MtmlkMlpLoss support_loss, query_loss;
  const void* theta[MTMLK_MLP_TENSORS];    // W_1 [O, I], b_1 [O], W_2, ...
  const void* rates[MTMLK_MLP_TENSORS];    // of each of them: [1] or [K]
  int32_t rate_stride[MTMLK_MLP_TENSORS];  // from a step's to the next: 0 or 1
  int32_t rate_at[MTMLK_MLP_TENSORS];      // where its gradient begins behind the parameters' in a task's parts
  int32_t n_rates;                         // numbers of all gradients of rates
  const void *support_x, *support_y;       // [T, S, I] and [T, S, O]
  const void *query_x, *query_y;           // of Q alike
  void *loss, *output, *support_losses;    // [T], [T, Q, O], [K, T]
  void* parts;                             // [T, P + n_rates]: each task's gradient, tensor by tensor
  void* history;  // [blocks, K, elements of a record]; of tiles whatever stays between launches
} MtmlkMlpCall;

// What decides which kernel runs a call, and how.
typedef struct {
  int32_t dtype;  // MtmlkDtype
  int32_t shape;  // of the list, see mtmlk_mlp_shape
  int32_t rows;   // of a warp, one of those of the shape
  int32_t blocks, threads;
  int32_t back_threads;  // of tiles, whose `blocks` are those of the way back, as many for every task
  int32_t overlaps;      // launches of tiles begin before the one before has ended, where the GPU can do that
} MtmlkMlpLaunch;

typedef struct {
  int32_t layers, widths[MTMLK_MLP_LAYERS + 1];
  int32_t bent;     // for activations whose second derivative is not 0
  int32_t rows[2];  // of a warp: for few tasks, for many; of tiles there and back
  int32_t tile;     // samples of a tile; 0: a block takes a whole task
  int32_t terms;    // of TF32 for one product of float32, on matrix units: 1 or 3; 0: multiply-adds
} MtmlkMlpShape;

// The shape at a place of the list; 0 beyond its end.
MTMLK_API int mtmlk_mlp_shape(int32_t index, MtmlkMlpShape* shape);
// Of a block, and elements of a step in its history; of tiles those of the way back where it is gone, and of all the
// history.
MTMLK_API int64_t mtmlk_mlp_shared_bytes(int32_t shape, const MtmlkMlpCall* call);
MTMLK_API int64_t mtmlk_mlp_record(int32_t shape, const MtmlkMlpCall* call);
MTMLK_API int mtmlk_run_mlp(const MtmlkMlpLaunch* launch, const MtmlkMlpCall* call, void* stream, MtmlkReason* reason);

// The same with a list of their own, of kernels whose large products are made on matrix units. Float32 only.
MTMLK_API int mtmlk_tf32_mlp_shape(int32_t index, MtmlkMlpShape* shape);
MTMLK_API int64_t mtmlk_tf32_mlp_shared_bytes(int32_t shape, const MtmlkMlpCall* call);
MTMLK_API int64_t mtmlk_tf32_mlp_record(int32_t shape, const MtmlkMlpCall* call);
MTMLK_API int mtmlk_run_tf32_mlp(const MtmlkMlpLaunch* launch, const MtmlkMlpCall* call, void* stream,
                                 MtmlkReason* reason);

#ifdef __cplusplus
}
#endif
