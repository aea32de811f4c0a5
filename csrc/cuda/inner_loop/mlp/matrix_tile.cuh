// Products on matrix units: of a warp's rows with a matrix, in the place of WideTile, and of all samples of a set for 32 x
// 32 weights.
//
// Which numbers a lane loads decides only where the products of a fragment stand; it is chosen so that the loads of a warp
// are to different banks.
#pragma once

#include <type_traits>

#include "cuda/inner_loop/matmul.cuh"
#include "cuda/inner_loop/mlp/elements.cuh"
#include "cuda/inner_loop/mlp/shape.cuh"
#include "cuda/inner_loop/mlp/tf32.cuh"

namespace mtmlk {

// [R, N] = A [R, K] B as its transpose: fragments of 16 columns by 8 rows. Lanes have the columns place(), + 8, + 16 ...
// and two neighbouring rows of every eight.
template <class T, int kR, int kN, int kTerms>
struct MatrixTile {
  static_assert(std::is_same<T, float>::value, "matrix units take TF32");
  static_assert(kR % 8 == 0 && kN % 16 == 0, "whole fragments");
  static constexpr int kHigh = kN / 16, kWide = kR / 8;
  using Elements = LaneElements<T, kN, 2 * kWide, 2 * kHigh>;
  using Left = Tf32<4, kTerms>;
  using Right = Tf32<2, kTerms>;

  int group, within, first, last;
  Elements own;
  T sum[kHigh][kWide][4];

  DEV MatrixTile(int lane, int first, int rows)
      : group(lane / 4), within(lane % 4), first(first), last(rows - 1), sum{} {
    const int end = least(first + kR, rows);
#pragma unroll
    for (int i = 0; i < 2 * kWide; ++i) own.set_row(i, first + i / 2 * 8 + 2 * within + i % 2, end);
#pragma unroll
    for (int j = 0; j < 2 * kHigh; ++j) own.set_col(j, 8 * j + place());
  }
  // Of eight neighbours: 0, 4, 1, 5 ..; two of them and four vectors of each are eight vectors in different banks.
  DEV int place() const { return group / 2 + 4 * (group % 2); }
  DEV int row(int w) const { return least(first + 8 * w + group, last); }

  DEV void add_columns(const T* c, T by = T(1)) {
    each([&](int h, int i, int w, int j) { sum[h][w][2 * i + j] += by * c[16 * h + 8 * i + place()]; });
  }
  // 16 of k at a time: a lane has a vector of every row, and each fragment two numbers of it.
  template <int K>
  DEV void add_nt(const T* a, const T* b) {
    static_assert(K % 16 == 0, "whole fragments");
    constexpr int kLd = row_of(K);
#pragma unroll 2
    for (int k = 4 * within; k < K; k += 16) {
      Right right[kWide][2];
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        const Four<T> x = four(a + row(w) * kLd + k);
#pragma unroll
        for (int v = 0; v < 4; ++v) right[w][v / 2].set(v % 2, x.v[v]);
      }
#pragma unroll
      for (int h = 0; h < kHigh; ++h) {
        Left left[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Four<T> x = four(b + (16 * h + 8 * i + place()) * kLd + k);
#pragma unroll
          for (int v = 0; v < 4; ++v) left[v / 2].set(i + 2 * (v % 2), x.v[v]);
        }
#pragma unroll
        for (int v = 0; v < 2; ++v)
#pragma unroll
          for (int w = 0; w < kWide; ++w) add_product(sum[h][w], left[v], right[w][v]);
      }
    }
  }
  // 8 of k at a time: a lane has two neighbours of them.
  template <int K>
  DEV void add_nn(const T* d, const T* b) {
    static_assert(K % 8 == 0, "whole fragments");
    constexpr int kLdD = row_of(K), kLdB = row_of(kN);
#pragma unroll 2
    for (int k = 2 * within; k < K; k += 8) {
      Right right[kWide];
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        const Two<T> x = *reinterpret_cast<const Two<T>*>(d + row(w) * kLdD + k);
        right[w].set(0, x.v[0]), right[w].set(1, x.v[1]);
      }
#pragma unroll
      for (int h = 0; h < kHigh; ++h) {
        Left left;
#pragma unroll
        for (int i = 0; i < 4; ++i) left.set(i, b[(k + i / 2) * kLdB + 16 * h + 8 * (i % 2) + place()]);
#pragma unroll
        for (int w = 0; w < kWide; ++w) add_product(sum[h][w], left, right[w]);
      }
    }
  }
  DEV void scale(T by) {
    each([&](int h, int i, int w, int j) { sum[h][w][2 * i + j] *= by; });
  }
  // This lane's shares of <sum, plane> of each of its rows, by every fourth fragment: to dots[row * stride + ..32].
  DEV void dot(const T* plane, T* dots, int stride) const {
    T total[2 * kWide][4] = {};
    each([&](int h, int i, int w, int j) {
      const T x = plane[own.row[2 * w + j] * row_of(kN) + own.col[2 * h + i]];
      total[2 * w + j][h % 4] += sum[h][w][2 * i + j] * x;
    });
#pragma unroll
    for (int r = 0; r < 2 * kWide; ++r)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (own.row_lives[r]) dots[own.row[r] * stride + 8 * q + group] = total[r][q];
  }
  DEV const Elements& elements() {
    each([&](int h, int i, int w, int j) { own.value[2 * w + j][2 * h + i] = sum[h][w][2 * i + j]; });
    return own;
  }

 private:
  // body(fragment of columns, its half, fragment of rows, neighbour)
  template <class Body>
  DEV static void each(Body body) {
#pragma unroll
    for (int h = 0; h < kHigh; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int w = 0; w < kWide; ++w)
#pragma unroll
          for (int j = 0; j < 2; ++j) body(h, i, w, j);
  }
};

// 32 x 32 of dz^T a, by one warp; rows of kLdD and of kLdA. A lane has four rows, 4 group + .., of two vectors.
template <class T, int kLdD, int kLdA, int kTerms>
struct MatrixBlock {
  int group, within;
  T sum[2][4][4];  // by pairs of its rows, by the four of a vector

  DEV explicit MatrixBlock(int lane) : group(lane / 4), within(lane % 4), sum{} {}

  // sum += d^T a over samples, eight at a time; beyond the last d counts as 0.
  DEV void add(const T* d, const T* a, int samples) {
    d += 4 * group, a += 4 * group;
#pragma unroll 1
    for (int n = 2 * within; n - 2 * within < samples; n += 8) {
      Tf32<4, kTerms> left[2];
      Tf32<2, kTerms> right[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = least(n + i, samples - 1);
        const Four<T> x = four(d + at * kLdD), y = four(a + at * kLdA);
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          left[v / 2].set(v % 2 + 2 * i, n + i < samples ? x.v[v] : T(0));
          right[v].set(i, y.v[v]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int v = 0; v < 4; ++v) add_product(sum[h][v], left[h], right[v]);
    }
  }
  DEV void store(T* to) const {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T* const at = to + (4 * group + 2 * h + i / 2) * kLdA + 4 * (2 * within + i % 2);
        *reinterpret_cast<Four<T>*>(at) = {sum[h][0][i], sum[h][1][i], sum[h][2][i], sum[h][3][i]};
      }
  }
};

}  // namespace mtmlk
