// The C ABI of the CPU engine: plain structs, raw pointers, sizes and an int status. No torch, no Python.
//
// A plan is made once per (program, shapes, options) and may be used by several threads at once.
#pragma once

#include <stdint.h>

#if defined(__GNUC__)
#define MTMLK_API __attribute__((visibility("default")))
#else
#define MTMLK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum MtmlkStatus {
  MTMLK_OK = 0,
  MTMLK_BAD_PROGRAM = 1,    // the encoded program is malformed
  MTMLK_BAD_LABEL = 2,      // a class id outside [0, C): MtmlkError says where
  MTMLK_OUT_OF_MEMORY = 3,  // the workspace could not be allocated
  MTMLK_NO_LOW_RANK = 4,    // MTMLK_LOW_RANK was asked for, but no weight admits it
  MTMLK_BAD_CALL = 5,       // a tensor that the plan reads is missing: MtmlkError says which
  MTMLK_BAD_ID = 8,         // an embedding's id beyond its table: MtmlkError says where
  MTMLK_STOPPED = 16        // by the answer to mtmlk_when_long's question; what the call wrote is undefined
};

enum MtmlkDtype { MTMLK_F32 = 0, MTMLK_F64 = 1 };

enum MtmlkNeeds {
  MTMLK_NEED_PARAMS = 1,
  MTMLK_NEED_LR = 2,
  MTMLK_NEED_SUPPORT_X = 4,
  MTMLK_NEED_QUERY_X = 8,
  MTMLK_NEED_HYPER = 16,    // the update rule's numbers
  MTMLK_NEED_MOMENTS = 32,  // the moments that a loop starts from
  MTMLK_NEED_SUPPORT_Y = 64,
  MTMLK_NEED_QUERY_Y = 128,
  MTMLK_NEED_SUPPORT_MASK = 256,
  MTMLK_NEED_QUERY_MASK = 512
};

// How adapted weights of linear layers are held: chosen by a cost model, each task's own, or in low-rank form.
enum MtmlkForm { MTMLK_AUTO = 0, MTMLK_WEIGHTS = 1, MTMLK_LOW_RANK = 2 };

// What is wrong with a plan's specification, in words.
typedef struct {
  char text[240];
} MtmlkReason;

typedef struct {
  int64_t code;      // MtmlkStatus
  int64_t is_query;  // which labels or ids were bad
  int64_t task, sample, label;
  const char* what;     // MTMLK_BAD_CALL: in words that last as long as the library
  int64_t input, rows;  // of an id: which input, and how many rows the table has
} MtmlkError;

typedef struct {
  int32_t kind;       // 0 mse, 1 cross_entropy, 2 bce_with_logits, 3 huber, 4 l1, 5 cross_entropy of probabilities
  int32_t reduction;  // 0 weighted mean over samples, 1 sum
  double p0;          // label smoothing or huber's delta
} MtmlkLoss;

// Everything that fixes a plan. Arrays are copied.
typedef struct {
  int32_t dtype;
  const int64_t* program;  // encoded layer program, see mtml_kernels/program/__init__.py
  int64_t n_program;
  const double* consts;
  int64_t n_consts;
  const uint8_t* adapted;  // [n_adapted]: one a parameter of the program
  int64_t n_adapted;
  int64_t support, query;  // samples a task
  int64_t steps;
  MtmlkLoss support_loss, query_loss;
  int32_t first_order;
  int32_t needs;               // MtmlkNeeds
  int32_t keep;                // adapted parameters wanted: 0 none, 1 the last, 2 all steps
  const int64_t* lr_steps;     // [n_lr] 1 or steps; n_lr is 1 (one rate for all) or the number of adapted parameters
  const uint8_t* lr_elements;  // [n_lr] 1 where the rate has one value an element
  int64_t n_lr;
  int32_t form;              // MtmlkForm; only MTMLK_WEIGHTS takes step_weights
  int32_t rule, rule_flags;  // UpdateRule, UpdateFlag of mtml/update.h; both 0: gradient descent
  int64_t taken;             // steps that the rule has taken before this loop
  const uint8_t* starts;     // [n_adapted] 1 where tasks bring parameters of their own, [T, *shape]; NULL: none does
  int32_t per_step;          // the support set has a step axis: [T, K, S, ...]
  int32_t query_steps;       // the query set is judged at theta_0 ... theta_K, each loss and output by itself
  int32_t tasks_apart;       // gradients of the parameters come a task: [T, *shape]
} MtmlkPlanSpec;

typedef struct MtmlkPlan MtmlkPlan;

// The tensors of one call, all contiguous, of the plan's dtype unless said otherwise. NULL where absent.
typedef struct {
  int64_t tasks;
  int32_t threads;
  const void* const* params;     // [n_params] -> [*shape]
  const void* const* support_x;  // [n_inputs] -> [T, S, size], int64 where an embedding reads it
  const void* const* query_x;    // [n_inputs] -> [T, Q, size]
  const void* support_y;         // int64 class ids [T, S], or values [T, S, out]
  const void* query_y;
  const void* support_mask;    // [T, S]
  const void* query_mask;      // [T, Q]
  const void* const* lr;       // [n_lr] -> [lr_steps] or [lr_steps, *shape]
  const void* step_weights;    // [K + 1]
  const double* hyper;         // [8] the update rule's numbers, see mtml/update.h; NULL for gradient descent
  const void* const* moments;  // [moments of the rule, n_adapted] -> [T, *shape] before the first step; NULL: zeros

  void* loss;            // [T]; with query_steps [K + 1, T], the output [K + 1, T, Q, out], their cotangents alike
  void* output;          // [T, Q, out]
  void* support_losses;  // [K, T]
  void* const* adapted;  // [n_adapted] -> [T, *shape] or [K + 1, T, *shape]
  void* const* moments_after;  // as moments; NULL: not wanted

  // Differentiation. Without cotangents the gradient of every task's own loss is carried.
  int32_t differentiate;
  const void* grad_loss;            // [T]
  const void* grad_output;          // [T, Q, out]
  const void* grad_support_losses;  // [K, T]
  const void* const* grad_adapted;  // [n_adapted], entries may be NULL
  const void* const* grad_moments;  // as moments_after; NULL, or entries NULL: zero
  void* carry;                      // [T or 1, carry_cols], see MtmlkPlanInfo
  void* grad_support_x;             // [n_inputs] concatenated, see mtmlk_plan_info; unscaled when grad_loss is NULL
  void* grad_query_x;
  void* grad_support_y;  // like the targets, which are values then, and the masks; unscaled likewise
  void* grad_query_y;
  void* grad_support_mask;
  void* grad_query_mask;
} MtmlkCall;

typedef struct {
  int64_t carry_cols;                              // elements to allow for one carry row, in the engine's own layout
  int64_t carry_per_task;                          // 1: one row a task; 0: one row, the sum over the tasks
  int64_t support_x_size, query_x_size;            // elements a task of the concatenated input gradients
  int64_t low_rank;                                // weights in low-rank form
  int64_t n_params, n_inputs, n_rates, n_adapted;  // how many tensors of each kind a call brings
  int64_t n_moments;                               // of the update rule, each n_adapted tensors
} MtmlkPlanInfo;

// Every index, size and product of the specification is checked here, once, so that calls need not. MTMLK_BAD_PROGRAM:
// `reason` says what is wrong.
MTMLK_API int mtmlk_plan_create(const MtmlkPlanSpec* spec, MtmlkPlan** plan, MtmlkReason* reason);
MTMLK_API void mtmlk_plan_destroy(MtmlkPlan* plan);
MTMLK_API void mtmlk_plan_info(const MtmlkPlan* plan, MtmlkPlanInfo* info);
// Threads that a call of so many tasks uses, of `most` that it may.
MTMLK_API int32_t mtmlk_plan_threads(const MtmlkPlan* plan, int64_t tasks, int32_t most);
MTMLK_API int32_t mtmlk_reads_ids(const MtmlkPlan* plan, int64_t input);  // whether an input is int64 ids
MTMLK_API int mtmlk_inner_loop(const MtmlkPlan* plan, const MtmlkCall* call, MtmlkError* error);

// grads[p] = sum_t scale[t] * carry[t], unpacked to [*shape]; lr_grads likewise. Returns 1 (and writes nothing) where
// the carry is already summed and the scales differ: the caller then runs mtmlk_inner_loop again with grad_loss.
MTMLK_API int mtmlk_carry_to_grads(const MtmlkPlan* plan, const void* carry, int64_t tasks, const void* scale,
                                   int64_t scale_stride, void* const* grads, void* const* lr_grads, void* hyper_grads,
                                   void* const* moment_grads, int32_t threads);

// A linear head on given features, adapted in the Gram matrix of each task's support features
// (csrc/cpu/head_inner_loop/task.h). All tensors are contiguous and of one dtype, class ids int64. NULL where absent.
typedef struct {
  int32_t dtype, threads;
  int64_t tasks, support, query, features, classes, steps;
  int64_t rate_groups;  // 1: the weight and the bias share their rates, or there is no bias
  MtmlkLoss support_loss, query_loss;
  double decay, proximal;
  int32_t needs_rates;

  const void *support_x, *query_x;    // [T, S, D], [T, Q, D]
  const void *weight, *bias, *rates;  // [C, D], [C], [rate_groups, K, C]
  const void *support_y, *query_y;    // ids [T, S], or values [T, S, C]
  const void *support_mask, *query_mask;

  void *loss, *logits, *support_losses;  // [T], [T, Q, C], [K, T]
  void* coefficients;                    // [T, rate_groups, C, S]
  void* carry;                           // [T, carry size], read by mtmlk_head_chain

  // Without any cotangent the loop carries the gradient of every task's own loss.
  const void *grad_loss, *grad_logits, *grad_support_losses, *grad_coefficients;

  // Results of mtmlk_head_chain, which scales each task's carry by grad_loss [T] (NULL: by 1).
  void *grad_support_x, *grad_query_x, *grad_weight, *grad_bias, *grad_rates;
} MtmlkHeadCall;

MTMLK_API int mtmlk_head_loop(const MtmlkHeadCall* call, MtmlkError* error);
MTMLK_API int mtmlk_head_chain(const MtmlkHeadCall* call);

// --- losses of several heads ---

// One head. A row is what has one class or is one sample: logits [rows / inner, classes, inner]; where inner is 1, a
// row begins `ld` elements after the one before it. Targets are contiguous.
typedef struct {
  int32_t kind;  // position in HEAD_KINDS of mtml_kernels/schema/losses.py
  int32_t mean;  // 0: sum
  int32_t ids;   // the target is int64 class ids [rows], else values like logits
  int64_t rows, classes, inner, ld;
  int64_t rows_per_weight;  // consecutive rows that share a sample weight
  int64_t ignore_index;
  double p0;  // label smoothing or huber's delta
  const void* logits;
  const void* target;
  const void* sample_weights;  // [rows / rows_per_weight] or NULL
  const void* class_weights;   // [classes] or NULL (cross_entropy)
  const void* pos_weights;     // [classes] or NULL (bce_with_logits)
  void* gradient;              // like logits, which it may be itself, or NULL
} MtmlkHead;

typedef struct {
  int64_t head, row, label;
} MtmlkHeadError;

// losses [n] and the gradient of each head's loss. MTMLK_BAD_LABEL: nothing was written.
MTMLK_API int mtmlk_multihead_loss(const MtmlkHead* heads, int64_t n, int32_t dtype, int32_t threads, void* losses,
                                   MtmlkHeadError* error);

// Linear heads on shared features: logits x W^T + b. Of `heads` the logits, gradient and ld are not read.
typedef struct {
  int64_t rows, features, n_heads;
  const void* x;               // [rows, features]
  const MtmlkHead* heads;      // [n_heads], of `rows` rows each
  const void* const* weights;  // [n_heads] -> [classes, features]
  const void* const* biases;   // [n_heads] -> [classes] or NULL
} MtmlkLinear;

MTMLK_API int64_t mtmlk_linear_stride(int32_t dtype, int64_t columns);  // of kept gradients: whole vectors

// losses [n_heads], and the gradients of each at all logits, kept [rows, stride].
MTMLK_API int mtmlk_linear_keep(const MtmlkLinear* linear, int32_t dtype, int32_t threads, void* losses, void* kept,
                                MtmlkHeadError* error);
// dx, dw[h], db[h] (each may be NULL) of sum_h cotangents[h] loss_h.
MTMLK_API int mtmlk_linear_back(const MtmlkLinear* linear, int32_t dtype, int32_t threads, const void* kept,
                                const double* cotangents, void* dx, void* const* dw, void* const* db);
// The losses and, with all cotangents 1, the gradients (each may be NULL), in blocks of rows whose logits are not kept.
MTMLK_API int mtmlk_linear_blocks(const MtmlkLinear* linear, int32_t dtype, int32_t threads, void* losses, void* dx,
                                  void* const* dw, void* const* db, MtmlkHeadError* error);

// --- building blocks: one operation for all tasks, contiguous tensors of one dtype; NULL where absent, none is empty ---

// y = f(x W^T + b); `weights` and `biases`: 1 (all tasks share it) or `tasks`. On the way back those of dx, dw and db are
// written that are there.
typedef struct {
  int32_t dtype, threads;
  int64_t tasks, rows, inputs, outputs, weights, biases;
  int32_t activation;  // Act of mtml/program.h, or -1
  double c0, c1;
  const void *x, *weight, *bias;  // [T, N, I], [weights, O, I], [biases, O]
  void* y;                        // [T, N, O]: written, or read on the way back
  const void* grad;               // [T, N, O]
  void *dx, *dw, *db;             // like x, weight, bias
} MtmlkTaskLinear;

MTMLK_API int mtmlk_task_linear(const MtmlkTaskLinear* call);
MTMLK_API int mtmlk_task_linear_back(const MtmlkTaskLinear* call);

// y = x * W + b; pairs are (along the height, along the width).
typedef struct {
  int32_t dtype, threads;
  int64_t tasks, samples, channels, outputs, groups, weights, biases;
  int64_t size[2], out[2], kernel[2], stride[2], pad[2], dilation[2];
  const void *x, *weight, *bias;  // [T, N, C, H, W], [weights, O, C / groups, kh, kw], [biases, O]
  void* y;                        // [T, N, O, OH, OW]
  const void* grad;               // like y
  void *dx, *dw, *db;
} MtmlkTaskConv2d;

MTMLK_API int mtmlk_task_conv2d(const MtmlkTaskConv2d* call);
MTMLK_API int mtmlk_task_conv2d_back(const MtmlkTaskConv2d* call);

// A step of a rule of mtml/update.h. Lists have n entries, those of moments one for every tensor of every moment, the
// first moment's first. Rates: [1 or T] of 1 or `size` elements; those of their cotangents always [T].
typedef struct {
  int32_t dtype, threads;
  int32_t rule, flags;
  int64_t tasks, n, step;                     // steps taken before this one
  const double* hyper;                        // [8]
  const int64_t* sizes;                       // [n] elements a task
  const int64_t *rate_tasks, *rate_elements;  // [n] 1 where there is one for each

  const void *const *params, *const *grads, *const *rates, *const *moments;  // moments NULL: zero
  void *const *params_after, *const *moments_after;
  const void *const *cot_params, *const *cot_moments;  // entries may be NULL: zero
  void *const *d_params, *const *d_grads, *const *d_rates, *const *d_moments;
  double* d_hyper;  // [T, 8]
} MtmlkTaskUpdate;

MTMLK_API int mtmlk_task_update(const MtmlkTaskUpdate* call);
MTMLK_API int mtmlk_task_update_back(const MtmlkTaskUpdate* call);

// Memory that is recycled, for gradients: fresh pages cost 35 ms per 256 MB. NULL: none is left, or the answer was
// MTMLK_STOP.
MTMLK_API void* mtmlk_acquire(int64_t bytes);
MTMLK_API void mtmlk_release(void* memory);

// Every 100 ms a call asks, in the thread that made it, whether it is to go on. One question for the process; NULL:
// none.
enum MtmlkAnswer { MTMLK_GO_ON = 0, MTMLK_STOP = 1, MTMLK_ASK_NO_MORE = 2 };
MTMLK_API void mtmlk_when_long(int32_t (*ask)(void));

// Multiply-adds of a call for which one more of its threads is worth its start. The threads are the engine's own, begun
// when a call first wants them.
MTMLK_API void mtmlk_thread_work(double share);

MTMLK_API double mtmlk_fma_peak(int32_t dtype, int32_t threads, double seconds);  // GFLOP/s
MTMLK_API const char* mtmlk_isa(void);                                            // "avx512", "avx2" or "base"
MTMLK_API const char* mtmlk_isa_reason(void);
MTMLK_API const char* mtmlk_isa_available(void);  // comma-separated

#ifdef __cplusplus
}
#endif
