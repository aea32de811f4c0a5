// The program of a thread block: one task's share of a schedule, as 32-bit words in phases.
//
//   program      phases, one after the other; each begins at a multiple of four words
//   phase        words of this phase, instructions in it, words of the next phase (0: there is none), 0; instructions
//   instruction  a head (Head), operands (Operand), whole numbers, real numbers (two words each), stages
//   stage        an instruction on elements; where it follows a product, each thread runs it on the elements that it has
//                just written itself
//
// Written by mtml_kernels/cuda/inner_loop/encoding.py; tests/cuda/test_block_program.py holds the two against each other.
#pragma once

#include <stdint.h>

namespace mtmlk {

enum ScheduleOp : int32_t {
  // Products of matrices.
  kMatmul = 0,
  // On elements.
  kActForward = 1,
  kActBackward = 2,
  kActTwice = 3,
  kAddition = 4,
  kMultiplication = 5,
  kTwoProducts = 6,
  kCopy = 7,
  kGradientStep = 8,
  kNormApply = 9,
  kNormBack = 10,
  kNormTangent = 11,
  kNormTwice = 12,
  kLookUp = 13,
  // On parameters.
  kRuleStep = 14,
  kRuleBack = 15,
  // Sums.
  kSumOfProducts = 16,
  kMoments = 17,
  kAddUpById = 18,
  kClipScale = 19,
  kClipBack = 20,
  // On rows.
  kSoftmaxForward = 21,
  kSoftmaxBackward = 22,
  kSoftmaxTangent = 23,
  kSoftmaxTwice = 24,
  kLossForward = 25,
  kLossTangent = 26,
  kLossData = 27,
  kSampleWeights = 28,
  kSampleWeightsBack = 29,
  kScheduleOpCount = 30,
  kLastOnElements = kLookUp
};

// The words of an instruction's head. Elements are counted row by row, [rows, cols]; a row is (sample n, row r of it),
// a column is (group g, feature f of it). Each divisor comes with what `Divisor` needs.
enum HeadWord : int32_t {
  kHeadOp,
  kHeadWords,   // of the instruction, its stages included
  kHeadStages,  // how many follow
  kHeadBody,    // where they begin
  kHeadTurn,    // the thread that takes the first piece: instructions of a phase begin at different ones
  kHeadRows,
  kHeadCols,
  kHeadColsMagic,
  kHeadColsShift,
  kHeadSample,  // rows of a sample
  kHeadSampleMagic,
  kHeadSampleShift,
  kHeadGroup,  // features of a group
  kHeadGroupMagic,
  kHeadGroupShift,
  kHeadSize
};

// Of a product, in place of the sample: how its factors lie (LayoutBits); in place of the group: its tiles in a row.
constexpr HeadWord kHeadLayout = kHeadSample, kHeadTiles = kHeadGroup;

// The bits of a layout: Along of A, Along of B, and whether all factors are read in whole vectors from the chip.
enum LayoutBits : int32_t { kLayoutB = 2, kLayoutWhole = 4 };

// Where an operand lies and how far its elements are apart.
enum OperandWord : int32_t {
  kOperandBase,     // Base, or kFirstTensor + position among the tensors of the call
  kOperandAt,       // elements from there
  kOperandPerTask,  // and this many times the number of tasks: of a tensor whose first dimension is not the tasks
  kOperandN,
  kOperandR,
  kOperandG,
  kOperandF,
  kOperandSize
};

enum Base : int32_t { kAbsent = -1, kOnChip = 0, kInWorkspace = 1, kFirstTensor = 2 };

// The most words of a phase: two of them lie on the chip, this one and the next.
constexpr int32_t kPhaseWords = 1024;

// A tensor of a call: element e of task t is at[t * stride + e].
struct TaskTensor {
  void* at;
  int64_t stride;
};

constexpr int kMostResults = 192;  // of a launch that sums over tasks
constexpr int kMostTensors = 192;  // 3 KB of the 4 KB of arguments that a kernel may have on every architecture

struct ScheduleCall {
  const int32_t* program;
  void* workspace;  // [blocks, workspace_elements]
  int64_t workspace_elements;
  int32_t first_words;    // of the first phase
  int32_t chip_elements;  // of the task's planes on the chip
  int32_t tasks;
  TaskTensor tensors[kMostTensors];
};

}  // namespace mtmlk
