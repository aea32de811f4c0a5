// Products of matrices of any strides:
//
//   out [M, C] = A1 [M, K] B1 [K, C] + A2 B2 + bias [C]
//
// k goes up in one order, in runs of kRun whose sums are added up, whatever the tile and the number of threads: neither
// changes a bit of the result. Operands: out, bias, A1, B1, A2, B2, of which rows use the stride r and columns f.
#pragma once

#include "cuda/inner_loop/machine.cuh"

namespace mtmlk {

constexpr int kRun = 128;

// A thread takes a tile of 2^shift rows, m_step apart, and as many columns, n_step apart, so that neighbouring threads
// read neighbouring columns. The more elements there are for each thread, the more of them share what is loaded.
// In double precision 16 sums, and 16 of the run, would not fit into the registers.
template <class T>
DEV int matmul_shift(int elements, int threads) {
  return elements <= 2 * threads ? 0 : elements <= 8 * threads || sizeof(T) == 8 ? 1 : 2;
}

template <class T>
struct MatmulOperands {
  Ref<T> out, bias, a[2], b[2];
  int rows, cols, depth;

  MatmulOperands() = default;
  DEV MatmulOperands(const Machine<T>& m, const Instruction& i)
      : out(m.operand(i, 0)), bias(m.operand(i, 1)), rows(i.rows()), cols(i.cols()), depth(i.whole(6, 0)) {
    for (int t = 0; t < 2; ++t) a[t] = m.operand(i, 2 + 2 * t), b[t] = m.operand(i, 3 + 2 * t);
  }
};

// The tile whose first element is (row, col).
template <class T, int kTile>
DEV void matmul_tile(const MatmulOperands<T>& p, int row, int m_step, int col, int n_step) {
  T total[kTile][kTile] = {};
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    if (!p.a[t].there()) continue;
    const T *a[kTile], *b[kTile];
#pragma unroll
    for (int e = 0; e < kTile; ++e) {  // beyond the edge the last row or column is read, and nothing written
      const int m = row + e * m_step, c = col + e * n_step;
      a[e] = p.a[t].at + (m < p.rows ? m : p.rows - 1) * p.a[t].r;
      b[e] = p.b[t].at + (c < p.cols ? c : p.cols - 1) * p.b[t].f;
    }
    for (int start = 0; start < p.depth; start += kRun) {
      const int end = start + kRun < p.depth ? start + kRun : p.depth;
      T sum[kTile][kTile] = {};
      for (int k = start; k < end; ++k) {
        T left[kTile], right[kTile];
#pragma unroll
        for (int e = 0; e < kTile; ++e) left[e] = a[e][k * p.a[t].f], right[e] = b[e][k * p.b[t].r];
#pragma unroll
        for (int x = 0; x < kTile; ++x)
#pragma unroll
          for (int y = 0; y < kTile; ++y) sum[x][y] += left[x] * right[y];
      }
#pragma unroll
      for (int x = 0; x < kTile; ++x)
#pragma unroll
        for (int y = 0; y < kTile; ++y) total[x][y] += sum[x][y];
    }
  }
#pragma unroll
  for (int x = 0; x < kTile; ++x)
#pragma unroll
    for (int y = 0; y < kTile; ++y) {
      const int m = row + x * m_step, c = col + y * n_step;
      if (m >= p.rows || c >= p.cols) continue;
      const T bias = p.bias.there() ? p.bias.at[c * p.bias.f] : T(0);
      p.out.at[m * p.out.r + c * p.out.f] = total[x][y] + bias;
    }
}

}  // namespace mtmlk
