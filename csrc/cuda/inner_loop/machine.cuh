// What an instruction works with: its words, its operands, its elements, and its threads.
#pragma once

#include <stdint.h>

#include "cuda/device_api.h"
#include "cuda/inner_loop/program.h"

// A function that is called, not copied into its callers: a rare instruction, whose registers are its own.
#if defined(__CUDACC__)
#define DEV_CALL __device__ __noinline__
#else
#define DEV_CALL inline
#endif

namespace mtmlk {

// n / d and the rest for 0 <= n < 2^31, by a product: magic = 2^(31 + shift) / d + 1, d <= 2^shift.
struct Divisor {
  int32_t d;
  uint32_t magic;
  int32_t shift;

  DEV int quotient(int n) const { return d == 1 ? n : int((uint64_t(uint32_t(n)) * magic) >> (31 + shift)); }
};

// An element: row r of sample n, feature f of group g.
struct Place {
  int n, r, g, f;
};

// An operand by element; absent ones read as 0.
template <class T>
struct Ref {
  T* at;
  int n, r, g, f;

  DEV bool there() const { return at != nullptr; }
  DEV T& operator[](const Place& e) const { return at[e.n * n + e.r * r + e.g * g + e.f * f]; }
  DEV T get(const Place& e, T absent = T(0)) const { return at ? (*this)[e] : absent; }
  DEV void set(const Place& e, T value) const {
    if (at) (*this)[e] = value;
  }
  // The same operand from element e on.
  DEV Ref from(const Place& e) const { return {at ? &(*this)[e] : nullptr, n, r, g, f}; }
};

// Which elements of [rows, cols] a thread takes: every `step`th from `first` on, or those of its tile of a product.
struct Walk {
  int first, step, end;
  int row, row_step, col, col_step, shift;  // of a tile: pieces i are (i >> shift, i & mask)
  bool tile;
};

// An instruction's words.
struct Instruction {
  const int32_t* words;

  DEV int head(HeadWord word) const { return words[word]; }
  DEV int op() const { return words[kHeadOp]; }
  DEV const int32_t* operand(int i) const { return words + kHeadSize + i * kOperandSize; }
  DEV int whole(int operands, int i) const { return words[kHeadSize + operands * kOperandSize + i]; }
  DEV double real(int operands, int wholes, int i) const {
    const int32_t* at = words + kHeadSize + operands * kOperandSize + wholes + 2 * i;
    union {
      uint32_t half[2];
      double value;
    } both;
    both.half[0] = uint32_t(at[0]), both.half[1] = uint32_t(at[1]);
    return both.value;
  }
  DEV int rows() const { return words[kHeadRows]; }
  DEV int cols() const { return words[kHeadCols]; }
  DEV Divisor divisor(HeadWord word) const { return {words[word], uint32_t(words[word + 1]), words[word + 2]}; }
  DEV int stages() const { return words[kHeadStages]; }
  DEV Instruction first_stage() const { return {words + words[kHeadBody]}; }
  DEV Instruction next() const { return {words + words[kHeadWords]}; }
};

// The elements of an instruction by row and column.
struct Space {
  Divisor sample, group;

  DEV explicit Space(const Instruction& i) : sample(i.divisor(kHeadSample)), group(i.divisor(kHeadGroup)) {}
  DEV Place at(int row, int col) const {
    const int n = sample.quotient(row), g = group.quotient(col);
    return {n, row - n * sample.d, g, col - g * group.d};
  }
};

// A block at work on a task.
template <class T>
struct Machine {
  T* chip;
  T* workspace;
  const ScheduleCall* call;
  int task, rank, threads;  // threads: a power of two, 32 or more

  template <class U = T>
  DEV Ref<U> ref(const int32_t* w) const {
    const int base = w[kOperandBase];
    char* at = nullptr;
    if (base == kOnChip)
      at = reinterpret_cast<char*>(chip);
    else if (base == kInWorkspace)
      at = reinterpret_cast<char*>(workspace);
    else if (base >= kFirstTensor) {
      const TaskTensor& t = call->tensors[base - kFirstTensor];
      const int64_t offset = int64_t(task) * t.stride + int64_t(w[kOperandPerTask]) * call->tasks;
      at = static_cast<char*>(t.at) + offset * int64_t(sizeof(U));
    }
    U* first = at ? reinterpret_cast<U*>(at) + w[kOperandAt] : nullptr;
    return {first, w[kOperandN], w[kOperandR], w[kOperandG], w[kOperandF]};
  }
  template <class U = T>
  DEV Ref<U> operand(const Instruction& i, int which) const {
    return ref<U>(i.operand(which));
  }

  // Whether no thread of this warp has one of so many pieces, which the threads take in turn.
  DEV bool idle(const Instruction& i, int pieces) const {
    return (((rank & ~31) - i.head(kHeadTurn)) & (threads - 1)) >= pieces;
  }

  // The threads of the block take the elements in turn.
  DEV Walk whole(const Instruction& i) const {
    const int first = (rank - i.head(kHeadTurn)) & (threads - 1);
    return {first, threads, i.rows() * i.cols(), 0, 0, 0, 0, 0, false};
  }

  // body(element) on those of a walk.
  template <class Body>
  DEV void each(const Instruction& i, const Walk& walk, Body body) const {
    const Space space(i);
    const Divisor cols = i.divisor(kHeadCols);
    const int rows = i.rows(), mask = (1 << walk.shift) - 1;
    for (int e = walk.first; e < walk.end; e += walk.step) {
      int row, col;
      if (walk.tile) {
        row = walk.row + (e >> walk.shift) * walk.row_step, col = walk.col + (e & mask) * walk.col_step;
        if (row >= rows || col >= cols.d) continue;
      } else {
        row = cols.quotient(e), col = e - row * cols.d;
      }
      body(space.at(row, col));
    }
  }

  // body(row) with a warp of 32 threads for each of `count` pieces, whatever the number of threads: what the lanes add
  // up has one order.
  template <class Body>
  DEV void each_by_warps(const Instruction& i, int count, Body body) const {
    const int warps = threads / 32, turn = i.head(kHeadTurn) / 32;
    const int warp = (rank / 32 - turn) & (warps - 1);
    for (int piece = warp; piece < count; piece += warps) body(piece, rank % 32);
  }
};

// The sum over a warp's lanes, in every lane.
template <class T>
DEV T warp_sum(T x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}
template <class T>
DEV T warp_max(T x) {
  for (int d = 16; d > 0; d /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, x, d);
    x = other > x || other != other ? other : x;
  }
  return x;
}

}  // namespace mtmlk
