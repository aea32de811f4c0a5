// Products of matrices:
//
//   out [M, C] = A1 [M, K] B1 [K, C] + A2 B2 + bias [C]
//
// The products of an element are added up in one order, whatever computes it: k goes in blocks of four, block b belongs
// to lane b % 4, each lane adds up its own from the first to the last, of A1 B1 and then of A2 B2, and the lanes' sums
// s are (s0 + s1) + (s2 + s3). So neither the number of threads nor where operands lie changes a bit.
//
// Operands: out, bias, A1, B1, A2, B2, of which rows use the stride r and columns f.
#pragma once

#include "cuda/inner_loop/machine.cuh"

namespace mtmlk {

constexpr int kLanes = 4;  // that share an element

template <class T>
struct MatmulOperands {
  Ref<T> out, bias;
  int rows, cols, depth;

  MatmulOperands() = default;
  DEV MatmulOperands(const Machine<T>& m, const Instruction& i)
      : out(m.operand(i, 0)), bias(m.operand(i, 1)), rows(i.rows()), cols(i.cols()), depth(i.whole(6, 0)) {}
};

// Where pair t of factors stands among the operands.
DEV int left_of(int t) { return 2 + 2 * t; }
DEV int right_of(int t) { return 3 + 2 * t; }
DEV int pairs_of(const Instruction& i) { return i.operand(left_of(1))[kOperandBase] == kAbsent ? 1 : 2; }

// --- any strides: a thread an element ---------------------------------------------------------------------------------

template <class T>
DEV void add_products(T (&sum)[kLanes], const Ref<T>& a, const Ref<T>& b, int row, int col, int depth) {
  const T *x = a.at + row * a.r, *y = b.at + col * b.f;
  for (int start = 0; start < depth; start += 4 * kLanes)
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = start + 4 * lane + j;
        if (k < depth) sum[lane] += x[k * a.f] * y[k * b.r];
      }
}

template <class T>
DEV void matmul_element(const Machine<T>& m, const Instruction& i, const MatmulOperands<T>& p, int row, int col) {
  T sum[kLanes] = {};
#pragma unroll 1
  for (int t = 0; t < pairs_of(i); ++t)
    add_products(sum, m.operand(i, left_of(t)), m.operand(i, right_of(t)), row, col, p.depth);
  const T bias = p.bias.there() ? p.bias.at[col * p.bias.f] : T(0);
  p.out.at[row * p.out.r + col * p.out.f] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + bias;
}

// --- rows of whole vectors on the chip: four lanes a tile -------------------------------------------------------------

template <class T>
struct alignas(16) Four {
  T v[4];
};
template <class T>
DEV Four<T> four(const T* at) {
  return *reinterpret_cast<const Four<T>*>(at);
}

// How a factor's vectors lie: along k, along its rows (of A) or columns (of B), or nowhere. Of both pairs alike, as the
// program says.
enum Along : int { kAlongK, kAlongEdge, kScattered };

struct MatmulLayout {
  Along a, b;
  bool whole;

  DEV static MatmulLayout of(const Instruction& i) {
    const int bits = i.head(kHeadLayout);
    return {Along(bits & 3), Along(bits >> kLayoutB & 3), (bits >> kLayoutWhole & 1) != 0};
  }
};

// A factor on the chip: elements from its start, distances along k and along the edge.
struct ChipFactor {
  int at, k, edge;
};

DEV ChipFactor left_factor(const Instruction& i, int t) {
  const int32_t* w = i.operand(left_of(t));
  return {w[kOperandAt], w[kOperandF], w[kOperandR]};
}
DEV ChipFactor right_factor(const Instruction& i, int t) {
  const int32_t* w = i.operand(right_of(t));
  return {w[kOperandAt], w[kOperandR], w[kOperandF]};
}

// A tile of kRows x 4 elements of which this lane adds up its share: rows `row`, row + row_step, ..., columns alike.
template <class T, int kRows>
struct LaneTile {
  int row, row_step, col, col_step, lane;
  T sum[kRows][4];

  DEV void add(const T (&x)[kRows], const T (&y)[4]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += x[i] * y[j];
  }

  // The vectors of A beyond its last row, and of B beyond its last column, are those of the last one, or what lies
  // behind it in its padded row: nothing of it is written.
  template <Along kA, Along kB>
  DEV void add_products(const T* chip, const ChipFactor& a, const ChipFactor& b, int rows, int cols, int depth) {
    int x[kRows], y[4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int at = row + i * row_step;
      x[i] = a.at + (kA == kAlongK ? (at < rows ? at : rows - 1) * a.edge : row + i);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = col + j * col_step;
      y[j] = b.at + (kB == kAlongK ? (at < cols ? at : cols - 1) * b.edge : col + j);
    }
    int k = 4 * lane;
    for (; k + 4 <= depth; k += 4 * kLanes) add_block<kA, kB>(chip, x, y, a.k, b.k, k);
#pragma unroll
    for (int j = 0; j < 3; ++j)  // the last block, of fewer than four
      if (k + j < depth) {
        T left[kRows], right[4];
#pragma unroll
        for (int i = 0; i < kRows; ++i) left[i] = chip[x[i] + (kA == kAlongK ? k + j : (k + j) * a.k)];
#pragma unroll
        for (int i = 0; i < 4; ++i) right[i] = chip[y[i] + (kB == kAlongK ? k + j : (k + j) * b.k)];
        add(left, right);
      }
  }

  template <Along kA, Along kB>
  DEV void add_block(const T* chip, const int (&x)[kRows], const int (&y)[4], int a_k, int b_k, int k) {
    Four<T> left[4], right[4];  // along k: one a row; along the edge: one a k
#pragma unroll
    for (int i = 0; i < (kA == kAlongK ? kRows : 4); ++i)
      left[i] = kA == kAlongK ? four(chip + x[i] + k) : edge<kRows>(chip + x[0] + (k + i) * a_k);
#pragma unroll
    for (int i = 0; i < 4; ++i) right[i] = four(kB == kAlongK ? chip + y[i] + k : chip + y[0] + (k + i) * b_k);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      T p[kRows], q[4];
#pragma unroll
      for (int i = 0; i < kRows; ++i) p[i] = kA == kAlongK ? left[i].v[j] : left[j].v[i];
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = kB == kAlongK ? right[i].v[j] : right[j].v[i];
      add(p, q);
    }
  }

  // kRows neighbours; two are half a vector.
  template <int kCount>
  DEV static Four<T> edge(const T* at) {
    if constexpr (kCount == 4) {
      return four(at);
    } else {
      Four<T> found = {};
#pragma unroll
      for (int i = 0; i < kCount; ++i) found.v[i] = at[i];
      return found;
    }
  }
};

// The lanes' sums, each lane left with its part of the tile: of four rows one, of two rows half of one.
template <class T>
struct LanePart {
  int row, first, count;  // of the tile
  T value[4];
};

template <class T>
DEV T from_lane(T x, int other) {
  return __shfl_xor_sync(0xffffffffu, x, other);
}

template <class T, int kRows>
DEV LanePart<T> combined(const LaneTile<T, kRows>& tile) {
  const bool odd = tile.lane & 1, high = tile.lane & 2;
  T half[kRows / 2][4];
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const T low = tile.sum[i][j], up = tile.sum[i + kRows / 2][j];
      half[i][j] = (odd ? up : low) + from_lane(odd ? low : up, 1);
    }
  LanePart<T> part = {};
  if constexpr (kRows == 4) {
    part.row = 2 * odd + high, part.count = 4;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      part.value[j] = (high ? half[1][j] : half[0][j]) + from_lane(high ? half[0][j] : half[1][j], 2);
  } else {
    part.row = odd, part.first = 2 * high, part.count = 2;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      part.value[j] = (high ? half[0][j + 2] : half[0][j]) + from_lane(high ? half[0][j] : half[0][j + 2], 2);
  }
  return part;
}

// Of a tile by all lanes of the warp, at work or not. Returns the elements that this lane wrote.
template <class T, int kRows>
DEV Walk matmul_tile(const T* chip, const Instruction& i, const MatmulOperands<T>& p, const MatmulLayout& layout,
                     int tile_row, int m_tiles, int tile_col, int n_tiles, int lane, bool live) {
  const bool rows_apart = layout.a == kAlongK, cols_apart = layout.b == kAlongK;
  LaneTile<T, kRows> tile = {rows_apart ? tile_row : kRows * tile_row,
                             rows_apart ? m_tiles : 1,
                             cols_apart ? tile_col : 4 * tile_col,
                             cols_apart ? n_tiles : 1,
                             lane,
                             {}};
  if (live)
#pragma unroll 1
    for (int t = 0; t < pairs_of(i); ++t) {
      const ChipFactor a = left_factor(i, t), b = right_factor(i, t);
      if (cols_apart)
        tile.template add_products<kAlongK, kAlongK>(chip, a, b, p.rows, p.cols, p.depth);
      else if (rows_apart)
        tile.template add_products<kAlongK, kAlongEdge>(chip, a, b, p.rows, p.cols, p.depth);
      else
        tile.template add_products<kAlongEdge, kAlongEdge>(chip, a, b, p.rows, p.cols, p.depth);
    }
  const LanePart<T> part = combined(tile);
  const int row = tile.row + part.row * tile.row_step, col = tile.col + part.first * tile.col_step;
  if (live && row < p.rows)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = col + j * tile.col_step;
      if (j < part.count && c < p.cols)
        p.out.at[row * p.out.r + c * p.out.f] = part.value[j] + (p.bias.at ? p.bias.at[c * p.bias.f] : T(0));
    }
  return {0, 1, live ? part.count : 0, row, 0, col, tile.col_step, 2, true};
}

}  // namespace mtmlk
