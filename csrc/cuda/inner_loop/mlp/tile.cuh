// Products of a warp's rows with a matrix: [R, N] = A [R, K] B, of B as [N, K] (nt) or as [K, N] (nn).
//
// Every element's products are added up in one order, so that neither R nor the number of warps changes a bit.
#pragma once

#include <type_traits>

#include "cuda/inner_loop/machine.cuh"
#include "cuda/inner_loop/matmul.cuh"
#include "cuda/inner_loop/mlp/elements.cuh"
#include "cuda/inner_loop/mlp/matrix_tile.cuh"
#include "cuda/inner_loop/mlp/shape.cuh"

namespace mtmlk {

// Eight columns or more: a quarter of the warp, eight lanes, has a fourth of k, of all rows and all columns, lane g the
// columns g, g + 8, ... Of an nt product every fourth vector; of an nn product two neighbours of eight, for rows of B
// that are two apart lie eight banks apart, whatever their length. The quarters' sums are (s0 + s2) + (s1 + s3), after
// which the upper two have the upper half of the rows, and odd ones every other column.
template <class T, int kR, int kN>
struct WideTile {
  static constexpr int kCols = (kN + 7) / 8, kHalf = (kR + 1) / 2;
  // Few rows: the loads of all vectors go ahead of the products; of many, one vector's products hide the next one's.
  static constexpr int kAhead = kR * kCols <= 16 ? 16 : 2;
  using Elements = LaneElements<T, kN, kHalf, (kCols + 1) / 2>;

  int lane, group, quarter, first, last;
  Elements own;
  T sum[kR][kCols];

  DEV WideTile(int lane, int first, int rows)
      : lane(lane), group(lane % 8), quarter(lane / 8), first(first), last(rows - 1), sum{} {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) own.set_row(i, first + (quarter >> 1) * kHalf + i, least(first + kR, rows));
#pragma unroll
    for (int j = 0; j < Elements::kCols; ++j) own.set_col(j, group + 8 * (2 * j + (quarter & 1)));
  }
  DEV int row(int i) const { return least(first + i, last); }
  DEV int col(int j) const { return least(group + 8 * j, kN - 1); }

  // sum = by c, of a vector [N].
  DEV void add_columns(const T* c, T by = T(1)) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const T x = quarter == 0 ? by * c[col(j)] : T(0);
#pragma unroll
      for (int i = 0; i < kR; ++i) sum[i][j] += x;
    }
  }
  template <int K>
  DEV void add_nt(const T* a, const T* b) {
    static_assert(K % 4 == 0, "whole vectors");
    constexpr int kLd = row_of(K);
#pragma unroll kAhead
    for (int start = 0; start < K; start += 16) {
      const int k = start + 4 * quarter;
      if (start + 16 > K && k >= K) break;
      Four<T> left[kR], right[kCols];
#pragma unroll
      for (int j = 0; j < kCols; ++j) right[j] = four(b + col(j) * kLd + k);
#pragma unroll
      for (int i = 0; i < kR; ++i) left[i] = four(a + row(i) * kLd + k);
#pragma unroll
      for (int v = 0; v < 4; ++v)
#pragma unroll
        for (int i = 0; i < kR; ++i)
#pragma unroll
          for (int j = 0; j < kCols; ++j) sum[i][j] += left[i].v[v] * right[j].v[v];
    }
  }
  template <int K>
  DEV void add_nn(const T* d, const T* b) {
    static_assert(K % 4 == 0, "whole vectors");
    constexpr int kLdD = row_of(K), kLdB = row_of(kN);
#pragma unroll kAhead
    for (int start = 0; start < K; start += 8) {
      const int k = start + 2 * quarter;
      if (start + 8 > K && k >= K) break;
      Two<T> left[kR];
#pragma unroll
      for (int i = 0; i < kR; ++i) left[i] = *reinterpret_cast<const Two<T>*>(d + row(i) * kLdD + k);
#pragma unroll
      for (int v = 0; v < 2; ++v)
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          const T right = b[(k + v) * kLdB + col(j)];
#pragma unroll
          for (int i = 0; i < kR; ++i) sum[i][j] += left[i].v[v] * right;
        }
    }
  }
  DEV void scale(T by) {
#pragma unroll
    for (int i = 0; i < kR; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j) sum[i][j] *= by;
  }
  // This lane's share of <sum, plane> of each row, to dots[row * stride + lane].
  DEV void dot(const T* plane, T* dots, int stride) const {
#pragma unroll
    for (int i = 0; i < kR; ++i) {
      T total = 0;
#pragma unroll
      for (int j = 0; j < kCols; ++j)
        if (group + 8 * j < kN) total += sum[i][j] * plane[row(i) * row_of(kN) + col(j)];
      if (first + i <= last) dots[(first + i) * stride + lane] = total;
    }
  }
  DEV const Elements& elements() {
    const bool upper = quarter & 2, odd = quarter & 1;
    T half[kHalf][2 * Elements::kCols] = {};
#pragma unroll
    for (int i = 0; i < kHalf; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const T low = sum[i][j], high = i + kHalf < kR ? sum[least(i + kHalf, kR - 1)][j] : T(0);
        half[i][j] = (upper ? high : low) + from_lane(upper ? low : high, 16);
      }
    __syncwarp();  // all of these before the first of the next: else the compiler waits for each by itself
#pragma unroll
    for (int i = 0; i < kHalf; ++i)
#pragma unroll
      for (int j = 0; j < Elements::kCols; ++j) {
        const T even_one = half[i][2 * j], odd_one = half[i][2 * j + 1];
        own.value[i][j] = (odd ? odd_one : even_one) + from_lane(odd ? even_one : odd_one, 8);
      }
    return own;
  }
};

// As wide, of fewer than four products an element: each lane has all of its elements' products.
template <class T, int kR, int kN>
struct ShallowTile {
  static constexpr int kHalf = (kR + 1) / 2;
  using Elements = LaneElements<T, kN, kHalf, ((kN + 7) / 8 + 1) / 2>;

  int lane;
  Elements own;

  DEV ShallowTile(int lane, int first, int rows) : lane(lane), own{} {
    const int quarter = lane / 8;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) own.set_row(i, first + (quarter >> 1) * kHalf + i, least(first + kR, rows));
#pragma unroll
    for (int j = 0; j < Elements::kCols; ++j) own.set_col(j, lane % 8 + 8 * (2 * j + (quarter & 1)));
  }
  DEV void add_columns(const T* c, T by = T(1)) {
    each([&](int, int col, T& sum) { sum += by * c[col]; });
  }
  template <int K>
  DEV void add_nt(const T* a, const T* b) {
    each([&](int row, int col, T& sum) {
#pragma unroll
      for (int k = 0; k < K; ++k) sum += a[row * K + k] * b[col * K + k];
    });
  }
  template <int K>
  DEV void add_nn(const T* d, const T* b) {
    each([&](int row, int col, T& sum) {
#pragma unroll
      for (int k = 0; k < K; ++k) sum += d[row * K + k] * b[k * row_of(kN) + col];
    });
  }
  DEV void scale(T by) {
    each([&](int, int, T& sum) { sum *= by; });
  }
  // This lane's share of <sum, plane> of each row; of rows of the other half it has none.
  DEV void dot(const T* plane, T* dots, int stride) const {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      T total = 0;
#pragma unroll
      for (int j = 0; j < Elements::kCols; ++j)
        if (own.col_lives[j]) total += own.value[i][j] * plane[own.row[i] * row_of(kN) + own.col[j]];
      if (own.row_lives[i]) dots[own.row[i] * stride + lane % 16] = total;
    }
  }
  DEV const Elements& elements() const { return own; }

 private:
  template <class Body>
  DEV void each(Body body) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i)
#pragma unroll
      for (int j = 0; j < Elements::kCols; ++j) body(own.row[i], own.col[j], own.value[i][j]);
  }
};

// Fewer columns: lanes are columns times slices of the rows, each with all of k in four sums.
template <class T, int kR, int kN>
struct NarrowTile {
  static constexpr int kSlices = least(kR, 32 / kN), kRows = (kR + kSlices - 1) / kSlices;
  using Elements = LaneElements<T, kN, kRows, 1>;

  int group;
  bool works;  // lanes beyond the last slice have nothing, and load nothing
  Elements own;
  T sum[kRows][4];

  DEV NarrowTile(int lane, int first, int rows) : group(lane % kN), works(lane / kN < kSlices), sum{} {
    const int end = least(first + kR, rows);
#pragma unroll
    for (int i = 0; i < kRows; ++i) own.set_row(i, works ? first + lane / kN + kSlices * i : end, end);
    own.set_col(0, group);
  }
  DEV void add_columns(const T* c, T by = T(1)) {
    const T x = by * c[group];
#pragma unroll
    for (int i = 0; i < kRows; ++i) sum[i][0] += x;
  }
  template <int K>
  DEV void add_nt(const T* a, const T* b) {
    if (works) add<K>(a, b + group * row_of(K), 1);
  }
  template <int K>
  DEV void add_nn(const T* d, const T* b) {
    if (works) add<K>(d, b + group, row_of(kN));
  }
  template <int K>
  DEV void add(const T* a, const T* b, int step) {
#pragma unroll 8
    for (int k = 0; k + 4 <= K; k += 4) {
      Four<T> right;
      if (step == 1)
        right = four(b + k);
      else
#pragma unroll
        for (int v = 0; v < 4; ++v) right.v[v] = b[(k + v) * step];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Four<T> left = four(a + own.row[i] * row_of(K) + k);
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[i][v] += left.v[v] * right.v[v];
      }
    }
#pragma unroll
    for (int k = K / 4 * 4; k < K; ++k)
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i][k % 4] += a[own.row[i] * row_of(K) + k] * b[k * step];
  }
  DEV void scale(T by) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int v = 0; v < 4; ++v) sum[i][v] *= by;
  }
  DEV T total(int i) const { return (sum[i][0] + sum[i][1]) + (sum[i][2] + sum[i][3]); }
  DEV void dot(const T* plane, T* dots, int stride) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (own.row_lives[i]) dots[own.row[i] * stride + group] = total(i) * plane[own.row[i] * row_of(kN) + group];
  }
  DEV const Elements& elements() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) own.value[i][0] = total(i);
    return own;
  }
};

// kTerms: on matrix units, by so many terms, where the product has whole fragments; 0: nowhere.
template <class T, int kR, int kN, int kK, int kTerms = 0>
using WarpTile =
    std::conditional_t<(kN < 8), NarrowTile<T, kR, kN>,
                       std::conditional_t<(kK < 4), ShallowTile<T, kR, kN>,
                                          std::conditional_t<(kTerms != 0 && kN % 16 == 0 && kK % 16 == 0),
                                                             MatrixTile<T, kR, kN, kTerms>, WideTile<T, kR, kN>>>>;

}  // namespace mtmlk
