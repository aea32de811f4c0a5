// The encoded layer program (written by mtml_kernels/program.py): op codes and record widths.
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
  kAffine = 9
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
  kActCount = 10
};

enum LossKind : int32_t { kMse = 0, kCrossEntropy = 1, kBce = 2, kHuber = 3, kL1 = 4 };

constexpr int kHeaderInts = 5;  // version, inputs, params, nodes, output value
constexpr int kParamInts = 3;   // layout, rows, cols
constexpr int kNodeInts = 9;    // op, a, b, weight, bias, rows, features, batched, const
constexpr int kVersion = 1;

}  // namespace mtmlk
