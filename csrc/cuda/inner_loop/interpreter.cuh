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

// What most programs are made of, and what only some need: those have a kernel of their own, whose registers are many.
enum KernelKind : int32_t { kPlainKernel = 0, kFullKernel = 1 };

// An instruction on the elements of a walk.
template <class T, KernelKind kKind>
DEV void run_on_elements(const Machine<T>& m, const Instruction& i, const Walk& walk) {
  if constexpr (kKind == kFullKernel) {
    switch (i.op()) {
      case kNormApply:
        return norm_apply(m, i, walk);
      case kNormBack:
        return norm_back(m, i, walk);
      case kNormTangent:
        return norm_tangent(m, i, walk);
      case kNormTwice:
        return norm_twice(m, i, walk);
      case kLookUp:
        return look_up(m, i, walk);
      default:
        break;
    }
  }
  switch (i.op()) {
    case kActForward:
    case kActBackward:
    case kActTwice:
      return activations(m, i, walk);
    case kGradientStep:
      return gradient_step(m, i, walk);
    default:
      return arithmetic(m, i, walk);
  }
}

// How a product is cut: pieces of height x width elements, each by `lanes` threads; or an instruction on elements, which
// is one piece a thread.
template <class T>
struct Pieces {
  MatmulOperands<T> p;
  MatmulLayout layout;
  bool product, two;
  int m_tiles, lane_bits;
  Divisor tiles;  // in a row

  DEV Pieces(const Machine<T>& m, const Instruction& i)
      : product(i.op() == kMatmul), two(false), m_tiles(1), lane_bits(0), tiles{1, 0, 0} {
    if (!product) return;
    p = MatmulOperands<T>(m, i), layout = MatmulLayout::of(i), tiles = i.divisor(kHeadTiles);
    lane_bits = layout.whole ? 2 : 0;
    // Two rows a tile while that leaves no thread more than one of them.
    two = sizeof(T) == 8 || ((p.rows + 3) >> 2) * tiles.d * kLanes * 2 <= m.threads;
    const int height_bits = !layout.whole ? 0 : two ? 1 : 2;
    m_tiles = (p.rows + (1 << height_bits) - 1) >> height_bits;
  }

  DEV int count() const { return m_tiles * tiles.d; }
  // Pieces that the block does at once.
  DEV int at_once(const Machine<T>& m) const { return m.threads >> lane_bits; }
  // Threads that have work.
  DEV int busy(const Instruction& i) const { return product ? count() << lane_bits : i.rows() * i.cols(); }

  // Does a piece, by all lanes of the warp, at work or not; the elements that this thread has written.
  DEV Walk run(const Machine<T>& m, const Instruction& i, int start) const {
    const Walk whole = m.whole(i);
    if (!product) return whole;
    const int piece = start + (whole.first >> lane_bits);
    const bool live = piece < count();
    const int row = live ? tiles.quotient(piece) : 0, col = live ? piece - row * tiles.d : 0;
    const int lane = m.rank & (kLanes - 1);
    if (!layout.whole) {
      if (live) matmul_element(m, i, p, row, col);
      return {0, 1, live ? 1 : 0, row, 0, col, 0, 2, true};
    }
    if constexpr (sizeof(T) == 4)
      if (!two) return matmul_tile<T, 4>(m.chip, i, p, layout, row, m_tiles, col, tiles.d, lane, live);
    return matmul_tile<T, 2>(m.chip, i, p, layout, row, m_tiles, col, tiles.d, lane, live);
  }
};

// A product or an instruction on elements, piece by piece, each with the stages that follow it.
template <class T, KernelKind kKind>
DEV void run_with_stages(const Machine<T>& m, const Instruction& i) {
  // No more threads have work than this, whatever the tiles are: four lanes take four columns, of which some may be beyond
  // the last.
  if (m.idle(i, i.rows() * ((i.cols() + 3) & ~3))) return;
  const Pieces<T> pieces(m, i);
  if (m.idle(i, pieces.busy(i))) return;
  for (int start = 0; start < pieces.count(); start += pieces.at_once(m)) {
    const Walk walk = pieces.run(m, i, start);
    Instruction stage = pieces.product ? i.first_stage() : i;
    const int count = i.stages() + (pieces.product ? 0 : 1);
    for (int s = 0; s < count; ++s) {
      run_on_elements<T, kKind>(m, stage, walk);
      stage = s == 0 && !pieces.product ? i.first_stage() : stage.next();
    }
  }
}

template <class T>
DEV void run_rare_instruction(const Machine<T>& m, const Instruction& i) {
  switch (i.op()) {
    case kRuleStep:
      return rule_step(m, i);
    case kRuleBack:
      return rule_back(m, i);
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
    case kLossData:
      return loss_data(m, i);
    default:
      return sample_weights_back(m, i);
  }
}

template <class T, KernelKind kKind>
DEV void run_instruction(const Machine<T>& m, const Instruction& i) {
  const int op = i.op();
  if (op <= kLastOnElements) {
    run_with_stages<T, kKind>(m, i);
  } else if (op == kSumOfProducts) {
    sum_of_products(m, i);
  } else if (op == kLossForward) {
    loss_forward(m, i);
  } else if (op == kLossTangent) {
    loss_tangent(m, i);
  } else if (op == kSampleWeights) {
    sample_weights(m, i);
  } else if constexpr (kKind == kFullKernel) {
    run_rare_instruction(m, i);
  }
}

// The words of a phase on their way to the chip.
DEV void fetch_phase(int32_t* to, const int32_t* from, int words, int rank, int threads) {
  for (int w = 4 * rank; w < words; w += 4 * threads) copy_async_16(to + w, from + w);
}

template <class T, KernelKind kKind>
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
    for (int n = 0; n < count; ++n, i = i.next()) run_instruction<T, kKind>(m, i);
    words = next;
  }
}

// The block's shared memory: two phases of the program, then the task's planes. On a device from nothing but where it
// begins, so that the compiler knows in which memory they lie.
template <class T>
struct BlockMemory {
  int32_t* ring;
  T* planes;

  DEV static BlockMemory of(int chip_elements) {
#if defined(__CUDACC__)
    (void)chip_elements;
    char* const at = dynamic_shared();
    return {reinterpret_cast<int32_t*>(at), reinterpret_cast<T*>(at + 2 * kPhaseWords * sizeof(int32_t))};
#else
    SharedCarver carver(dynamic_shared());
    int32_t* const ring = carver.take<int32_t>(2 * kPhaseWords);
    return {ring, carver.take<T>(size_t(chip_elements))};
#endif
  }
};

template <class T, KernelKind kKind>
__global__ void __launch_bounds__(256, 1) inner_loop_kernel(const __grid_constant__ ScheduleCall call) {
  const BlockMemory<T> memory = BlockMemory<T>::of(call.chip_elements);
  Machine<T> m = {memory.planes, nullptr, &call, 0, int(threadIdx.x), int(blockDim.x)};
  if (call.workspace) m.workspace = static_cast<T*>(call.workspace) + int64_t(blockIdx.x) * call.workspace_elements;
  for (m.task = int(blockIdx.x); m.task < call.tasks; m.task += int(gridDim.x)) run_program<T, kKind>(m, memory.ring);
}

}  // namespace mtmlk
