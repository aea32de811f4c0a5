// A block runs the program of its tasks, one after the other: phases between barriers, in each of which instructions
// touch nothing that another one of them writes.
#pragma once

#include <stdint.h>

#include "cuda/inner_loop/losses.cuh"
#include "cuda/inner_loop/machine.cuh"
#include "cuda/inner_loop/matmul.cuh"
#include "cuda/inner_loop/norms.cuh"
#include "cuda/inner_loop/pointwise.cuh"
#include "cuda/inner_loop/program.h"
#include "cuda/inner_loop/rows.cuh"
#include "cuda/inner_loop/sums.cuh"
#include "cuda/inner_loop/updates.cuh"

namespace mtmlk {

// An instruction on the elements of a walk.
template <class T>
DEV void run_on_elements(const Machine<T>& m, const Instruction& i, const Walk& walk) {
  switch (i.op()) {
    case kActForward:
    case kActBackward:
    case kActTwice:
      return activations(m, i, walk);
    case kNormApply:
      return norm_apply(m, i, walk);
    case kNormBack:
      return norm_back(m, i, walk);
    case kNormTangent:
      return norm_tangent(m, i, walk);
    case kNormTwice:
      return norm_twice(m, i, walk);
    case kGradientStep:
      return gradient_step(m, i, walk);
    case kRuleStep:
      return rule_step(m, i, walk);
    case kRuleBack:
      return rule_back(m, i, walk);
    case kLookUp:
      return look_up(m, i, walk);
    default:
      return arithmetic(m, i, walk);
  }
}

// A product, tile by tile, or an instruction on elements, each with the stages that follow it.
template <class T>
DEV void run_with_stages(const Machine<T>& m, const Instruction& i) {
  const bool product = i.op() == kMatmul;
  MatmulOperands<T> operands;
  if (product) operands = MatmulOperands<T>(m, i);
  const int shift = product ? matmul_shift<T>(i.rows() * i.cols(), m.threads) : 0;
  const int m_step = (i.rows() + (1 << shift) - 1) >> shift, n_step = (i.cols() + (1 << shift) - 1) >> shift;
  Walk walk = m.whole(i);
  const int pieces = product ? m_step * n_step : walk.first + 1, step = product ? m.threads : pieces;
  for (int piece = walk.first; piece < pieces; piece += step) {
    Instruction stage = i;
    int stages = i.stages();
    if (product) {
      const int row = piece / n_step, col = piece - row * n_step;
      if (shift == 0)
        matmul_tile<T, 1>(operands, row, m_step, col, n_step);
      else if (shift == 1)
        matmul_tile<T, 2>(operands, row, m_step, col, n_step);
      else if constexpr (sizeof(T) == 4)
        matmul_tile<T, 4>(operands, row, m_step, col, n_step);
      walk = {0, 1, 1 << (2 * shift), row, m_step, col, n_step, shift, true};
      stage = i.first_stage();
    } else {
      ++stages;  // itself
    }
    for (int s = 0; s < stages; ++s) {
      run_on_elements(m, stage, walk);
      stage = !product && s == 0 ? i.first_stage() : stage.next();
    }
  }
}

template <class T>
DEV void run_instruction(const Machine<T>& m, const Instruction& i) {
  switch (i.op()) {
    case kSumOfProducts:
      return sum_of_products(m, i);
    case kMoments:
      return moments(m, i);
    case kAddUpById:
      return add_up_by_id(m, i);
    case kClipScale:
      return clip_scale(m, i);
    case kClipBack:
      return clip_back(m, i);
    case kSoftmaxForward:
      return softmax_forward(m, i);
    case kSoftmaxBackward:
    case kSoftmaxTangent:
    case kSoftmaxTwice:
      return softmax_derivatives(m, i);
    case kLossForward:
      return loss_forward(m, i);
    case kLossTangent:
      return loss_tangent(m, i);
    case kLossData:
      return loss_data(m, i);
    case kSampleWeights:
      return sample_weights(m, i);
    case kSampleWeightsBack:
      return sample_weights_back(m, i);
    default:
      return run_with_stages(m, i);
  }
}

// The words of a phase on their way to the chip.
DEV void fetch_phase(int32_t* to, const int32_t* from, int words, int rank, int threads) {
  for (int w = 4 * rank; w < words; w += 4 * threads) copy_async_16(to + w, from + w);
}

template <class T>
DEV void run_program(Machine<T>& m, int32_t* ring) {
  const int32_t* from = m.call->program;
  int words = m.call->first_words, turn = 0;
  __syncthreads();  // what the task before left is read no more
  fetch_phase(ring, from, words, m.rank, m.threads);
  while (words) {
    copy_async_wait_all();
    __syncthreads();
    const int32_t* phase = ring + turn * kPhaseWords;
    const int count = phase[1], next = phase[2];
    turn ^= 1, from += words;
    fetch_phase(ring + turn * kPhaseWords, from, next, m.rank, m.threads);
    Instruction i = {phase + 4};
    for (int n = 0; n < count; ++n, i = i.next()) run_instruction(m, i);
    words = next;
  }
}

template <class T>
__global__ void __launch_bounds__(256) inner_loop_kernel(const __grid_constant__ ScheduleCall call) {
  SharedCarver carver(dynamic_shared());
  int32_t* ring = carver.take<int32_t>(2 * kPhaseWords);
  Machine<T> m = {carver.take<T>(call.chip_elements), nullptr, &call, 0, int(threadIdx.x), int(blockDim.x)};
  if (call.workspace) m.workspace = static_cast<T*>(call.workspace) + int64_t(blockIdx.x) * call.workspace_elements;
  for (m.task = int(blockIdx.x); m.task < call.tasks; m.task += int(gridDim.x)) run_program(m, ring);
}

// out[e] = sum over tasks, in their order, of scale[t] parts[t, e]; scale NULL: 1.
template <class T>
__global__ void __launch_bounds__(256)
    sum_over_tasks(const T* parts, const T* scale, int tasks, int64_t elements, T* out) {
  const int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= elements) return;
  T sum = scale ? scale[0] * parts[e] : parts[e];
  for (int t = 1; t < tasks; ++t) {
    const T part = parts[t * elements + e];
    sum += scale ? scale[t] * part : part;
  }
  out[e] = sum;
}

}  // namespace mtmlk
