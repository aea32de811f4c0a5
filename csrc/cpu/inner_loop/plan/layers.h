// What the planning code has to know of each operation. A new one has a line in layers.cpp's table, beside its
// enumerator of Op and its line in layers/table.h.
#pragma once

#include <stdint.h>

#include "inner_loop/plan/storage.h"

namespace mtmlk {

// Where a node's kind stands in its record, in the place of an operand.
enum class KindIn { kNowhere, kA, kB };

// Whether a node names a parameter.
enum class Reads { kNever, kMaybe, kAlways };

// What sets an operation apart.
enum LayerFlags : int32_t {
  kPlain = 0,
  kWindowed = 1,     // its constants are a window; else two at most
  kNeedsConsts = 2,  // it cannot do without its two
  kProducts = 4,     // its work are multiply-adds of its weight
  kKeepsOutput = 8   // its output is read again, or not its own: no activation may overwrite it
};

struct NodeCheck;

struct LayerTraits {
  const char* name;
  int operands;  // earlier nodes that it reads: a, then b
  KindIn kind;   // of an operation with `kinds` kinds, or (kinds 0) the index of an input
  int32_t kinds;
  const char* bad_kind;  // what is said of any other
  Reads weight, bias;
  int32_t flags;                                               // LayerFlags
  bool (*fits)(const NodeCheck&);                              // its form: shapes and constants
  bool (*reads_elements)(const Plan&, const ValuePlan&) = {};  // not vectors, which would need padded rows
  bool (*mixes)(const ValuePlan&) = {};                        // the samples of a set
};

const LayerTraits& traits_of(int32_t op);  // of an operation that there is not: none

bool check_node(const PlanStorage& plan, int64_t index, const Why& why);

}  // namespace mtmlk
