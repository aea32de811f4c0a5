// The encoded layer program (written by mtml_kernels/program/__init__.py): op codes and record widths.
#pragma once

#include <stdint.h>

namespace mtmlk {

enum Op : int32_t {
  kInput = 0,
  kParam = 1,
  kView = 2,
  kLinear = 3,
  kAct = 4,
  kAdd = 5,
  kMul = 6,
  kCat = 7,
  kExpand = 8,
  kAffine = 9,
  kTranspose = 10,
  kConv = 11,
  kNorm = 12,
  kPool = 13,
  kEmbedding = 14,
  kSlice = 15,
  kSoftmax = 16,
  kLinearTransposed = 17,
  kOpCount = 18
};

enum Act : int32_t {
  kRelu = 0,
  kLeakyRelu = 1,
  kTanh = 2,
  kSigmoid = 3,
  kGeluErf = 4,
  kGeluTanh = 5,
  kSilu = 6,
  kSoftplus = 7,
  kSin = 8,
  kCos = 9,
  kRsqrt = 10,
  kElu = 11,
  kActCount = 12
};

enum NormKind : int32_t { kBatchNorm = 0, kGroupNorm = 1, kLayerNorm = 2, kRmsNorm = 3, kUnitNorm = 4, kNormCount = 5 };

enum SoftmaxKind : int32_t { kSoftmaxItself = 0, kLogSoftmax = 1, kSoftmaxCount = 2 };

enum PoolKind : int32_t { kMaxPool = 0, kAvgPool = 1, kAdaptiveAvgPool = 2, kPoolCount = 3 };

enum ParamLayout : int32_t { kLinearWeight = 0, kRows = 1, kConvWeight = 2, kStepRows = 3, kInOutWeight = 4 };

// The constants of a convolution or pooling node, in this order.
enum Window : int32_t {
  kHeight,
  kWidth,
  kOutHeight,
  kOutWidth,
  kKernelY,
  kKernelX,
  kStrideY,
  kStrideX,
  kPadY,
  kPadX,
  kDilationY,
  kDilationX,
  kGroups,            // of a convolution
  kDivisor = kGroups  // of an average: 0 counts padding, -1 does not, else the divisor itself
};

// Losses of the inner loop; formulas in losses.h. Cross-entropy of class ids, and of probabilities.
enum LossKind : int32_t {
  kMse = 0,
  kCrossEntropy = 1,
  kBce = 2,
  kHuber = 3,
  kL1 = 4,
  kSoftCrossEntropy = 5,
  kLossCount = 6
};

// Losses of several heads.
enum MultiheadKind : int32_t {
  kMultiheadCrossEntropy = 0,
  kMultiheadBce = 1,
  kMultiheadMse = 2,
  kMultiheadL1 = 3,
  kMultiheadHuber = 4,
  kMultiheadGaussian = 5,
  kMultiheadKl = 6,
  kMultiheadCount = 7
};

constexpr int kHeaderInts = 5;  // version, inputs, params, nodes, output value
constexpr int kParamInts = 3;   // layout, rows, cols
constexpr int kNodeInts = 9;    // op, a, b, weight, bias, rows, features, batched, const
constexpr int kWindowConsts = 13;
constexpr int kVersion = 2;

}  // namespace mtmlk
