// A plan: the decoded program with everything that shapes and options decide, made once and read by all threads.
//
// Plain arrays, so that the per-ISA files see no STL template. Sizes are in elements of the plan's dtype.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/program.h"
#include "inner_loop/plan/taps.h"

namespace mtmlk {

// Planes of a value: primal, its gradient (delta), and the tangents of both.
enum Plane : int32_t { kPrimal = 0, kDelta = 1, kTangent = 2, kDeltaTangent = 3, kPlanes = 4 };

// Partial sums of a unit: see norm/stats.h.
constexpr int64_t kSlotRows = 3;

// Rows of a value cut into units: `samples` whole samples, or bands of `rows` rows of one sample.
struct RowUnits {
  int64_t samples, bands, rows;
};

// How a convolution's work is cut. Everything depends on one task's shape alone, so that results do not depend on the
// threads that share it.
constexpr int64_t kMaxParts = 4;

// A convolution (or the gradient of its input) two pixels at a time, see conv/pairs.h.
struct PairPlan {
  TapPlan taps;  // of kernel rows, on planes of pairs
  bool forward;
  int64_t pairs;  // a row of the destination
  int64_t width, source_width, source_height, pad_x;
  int64_t stride, pad_y, reach;  // of rows
  int64_t kernel_y, weight_rows;
  int64_t band_rows, step_rows;  // of the destination: whose sources, and whose results, are in planes at once
};

struct ConvPlan {
  int64_t taps, channels;  // of one group
  TapPlan forward, backward;
  // Outputs are made in units that stay in the first-level cache, where their statistics are taken. In image rows.
  RowUnits units;
  // Gradients of the outputs are made and used in groups that stay in the second-level cache: whole samples, or bands
  // of rows where no gradient of the input is wanted, which reads across the bands' borders. Each part (a run of
  // groups) has its own buffer of the weight's gradient, which is filled from pieces that stay in the first-level
  // cache.
  RowUnits groups;
  int64_t grad_samples, grad_rows;
  bool in_pairs;
  PairPlan pairs_forward, pairs_backward;
};

// A normalisation together with the relu (or leaky relu) and the max-pooling after it, which run in the same passes:
// none of the values between them has a plane.
struct NormPlan {
  int64_t kind, groups;
  double eps;
  int32_t self, tail;  // the normalisation, and the last value of the chain
  double slope;        // of the activation for negative inputs; 1 where there is none
  bool pooled;         // windows that do not overlap
  int64_t pool_y, pool_x;
  int64_t out_rows;
  // The convolution before it has no other reader: it takes the statistics while its outputs are in cache, and the
  // gradient of its outputs is handed to it group by group instead of being stored.
  bool streamed;
  RowUnits stats, sums;  // each with a partial statistic of its own: of the input's rows, and of the tail's
  int64_t coefs, coefs_tangent, peak, peak_tangent;  // offsets in the planes, see norm/batch_group.h
};

struct ValuePlan {
  // The node, as it stands in the program.
  int32_t self;  // its position among the values
  int32_t op, a, b, weight, bias, kind;
  double c0, c1;
  int64_t rows, features;  // per sample (batched) or in all
  bool batched;
  const int64_t* window;  // [kWindowConsts] of a convolution or pooling

  // Dependence.
  bool live;  // reaches the output
  bool tan;   // depends on an adapted parameter: has a delta in the inner loop and a tangent
  bool meta;  // depends on something a meta-gradient is wanted for

  // Placement.
  int64_t ld;               // a row padded to vectors
  int64_t ld_primal;        // the same but for an input read in place, whose rows are not padded
  bool direct_input;        // an input that only linear layers read: used where it lies
  int32_t act_mode;         // ActMode
  int64_t offset[kPlanes];  // per sample of the block (batched), else absolute; see Layout

  // Order: which gradients are added to what a later node wrote in the same pass.
  bool add_a, add_b;          // those of its operands
  bool add_weight, add_bias;  // those of its parameters

  // Fusion. A relu in place is applied by the products that write its plane: forward by the linear layer before it,
  // backward by the one after it, where that is its only reader.
  bool gate_output, gate_input;    // of a linear layer
  bool gated_before, gated_after;  // of the relu
  bool in_chain;                   // computed by the normalisation before it, see NormPlan
  bool streamed;                   // a convolution whose output's gradient has no plane
  bool remade;                     // its output has none for the query set either, see Block::remake
  const ConvPlan* conv;
  NormPlan* norm;  // of a normalisation, and of what runs with it
};

struct ParamPlan {
  int32_t layout;  // ParamLayout; of a weight stored [in, out] kLinearWeight, as it is packed
  bool in_out;
  bool adapted, meta, used, transposed;
  bool low;              // a weight whose tasks' values and gradients stay in low-rank form, see low_rank.h
  int32_t layer;         // the only linear layer that reads it, else -1
  bool stepped;          // adapted, and each task's values are formed
  bool starts;           // tasks bring values of their own, [T, *shape]
  bool narrow;           // a linear weight with few outputs: kept as [O, I] rows, needs no transposed copy
  int32_t lr;            // which rate, -1 if not adapted
  int64_t rows, cols;    // as in the module: [O, I], [O, channels * taps] or [rows, cols]
  int64_t taps;          // of a convolution's weight
  int64_t size;          // packed: I * pad(O), or rows * pad(cols) where narrow or no weight
  int64_t size_t_;       // transposed copy: taps * O * pad(I), 0 where none is needed
  int64_t full, full_t;  // offsets among all parameters, those in low-rank form last
  int64_t own, own_t;    // offsets among the stepped ones
  int64_t low_at;        // offset of a low one's gradient in a carry row
};

struct LrPlan {
  int64_t steps;  // 1 or K
  bool elements;
  int64_t size;    // packed elements a step (1 where scalar)
  int64_t packed;  // offset in the packed rates
  int64_t carry;   // offset of its gradient in a carry row
  int32_t param;   // -1: shared by all adapted parameters
};

struct InputPlan {
  int64_t size;    // elements a sample
  int64_t offset;  // in the concatenated gradient of one sample, to which ids add nothing
  bool ids;        // int64, which embeddings read
};

// Rows of one phase, cut into chunks (units of parallel work inside a task, each with its own gradient buffer) and
// blocks (units that stay in cache). Depends on the shape of one task only: results must not change with T or threads.
struct Cut {
  int64_t samples, chunks, blocks, block_samples;  // blocks a chunk
};

struct Plan {
  // The program and the options, as given.
  int32_t dtype;
  int32_t lanes;
  int64_t n_values, n_params, n_inputs, n_lr, n_adapted;
  int32_t output;
  ValuePlan* values;
  ParamPlan* params;
  LrPlan* lrs;
  InputPlan* inputs;
  int64_t steps;
  MtmlkLoss support_loss, query_loss;
  bool first_order;
  // The update rule, see mtml/update.h. Plain gradient descent has passes of its own.
  int32_t rule, rule_flags, n_moments;
  int64_t taken;  // steps of the rule before this loop
  bool plain;
  bool starts;           // some parameters are each task's own
  int64_t support_sets;  // 1, or one a step
  bool query_steps;      // the query set at every theta_k, each by itself
  bool tasks_apart;      // gradients a task
  int32_t needs, keep;

  // Samples, outputs and inputs.
  Cut support, query;
  int64_t out_rows, out_features, out_ld, out_size;
  int64_t input_size;  // of one sample, all inputs but ids

  // What kind of program it is.
  bool heavy;        // has convolutions
  bool mixes;        // a normalisation mixes a set's samples: one block holds them all
  bool watched;      // a pass takes so long that its nodes look at the call's Watch
  bool low_rank;     // some weight is in low-rank form
  double task_work;  // multiply-adds of a task, way back included

  // Sizes of parameters and rates, and of a row of the carry.
  int64_t full_size, full_t_size, own_size, own_t_size, lr_size;
  int64_t lambda_size;           // gradients of all parameters but the low ones
  int64_t hyper_at, moments_at;  // offsets in a carry row
  int64_t carry_cols;            // those and the rates': what each task has
  int64_t carry_end;             // and the low weights', which are summed over the tasks at once
  int64_t carry_room;            // what a row of the carry is given: enough for the layout of any instruction set
  bool carry_per_task;

  // Planes.
  int64_t plane_size[kPlanes];  // a sample, batched values
  int64_t remade_size;          // of them, at the end of the primal ones
  int64_t fixed_size[kPlanes];  // unbatched values
  int64_t transient_size;       // planes of one worker

  // Scratch.
  int64_t chunk_size;           // gradients of one chunk: parameters, then deltas of unbatched values
  int64_t scratch_size;         // of one task, shared by its workers
  int64_t worker_scratch_size;  // of each worker
  int64_t pair_weights;         // where transformed weights lie in the scratch, see conv/pairs.h
  int64_t worker_pairs;         // where a worker's planes of pairs lie in its own

  // What one task remembers of one inner step, in this order: adapted parameters and their transposes, the gradient
  // (when a rate is learnt), planes of unbatched values, planes of batched ones (when kept).
  bool keep_planes;
  bool fused_update;                                                         // the products write theta_{k+1} directly
  int64_t state_size, state_grad, state_moments, state_fixed, state_blocks;  // size and offsets
  int64_t slots;  // steps held at once: all of them, or one segment between checkpoints

  // Low-rank form: a task's planes of all steps, then of its query set, are kept until its wave's gradients are summed.
  int64_t query_at, task_size, gram_size, kept_size;
  int64_t task_rows;  // of lambda_0's factors in one layer, at most
};

// How the tasks of a call go to its threads: groups of tasks in a row to `seats`, which share their tasks' chunks, or their
// nodes where samples are mixed, with `workers` each. The groups do not depend on the threads.
struct Split {
  int64_t group, groups;  // tasks of one; how many
  int seats, workers;
};

// Where `carry_to_grads` writes; entries that are not wanted are NULL.
struct CarryTargets {
  void* const* params;   // [n_params + 1]: [*shape], where tasks bring their own [T, *shape]; then room for a carry row
  void* const* lr;       // [n_lr]
  void* hyper;           // [kHyperCount]
  void* const* moments;  // [n_moments, n_adapted] -> [T, *shape]
};

int create_plan(const MtmlkPlanSpec& spec, int lanes, Plan** plan, MtmlkReason* reason);
void destroy_plan(Plan* plan);
Split split_tasks(const Plan& plan, int64_t tasks, int threads);
bool ids_ok(const Plan& plan, const MtmlkCall& call, MtmlkError* error);  // of embeddings; false: `error` says which

}  // namespace mtmlk
