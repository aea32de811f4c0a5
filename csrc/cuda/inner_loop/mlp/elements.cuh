// What a lane has of a product of a warp's rows, and where it lies.
#pragma once

#include "cuda/inner_loop/mlp/shape.cuh"

namespace mtmlk {

// What a lane has of [R, N] once its products are added up: kRows x kCols elements, of which some may be beyond the end.
template <class T, int kN, int kRows_, int kCols_>
struct LaneElements {
  static constexpr int kRows = kRows_, kCols = kCols_;
  int row[kRows], col[kCols];  // beyond the end: the last
  bool row_lives[kRows], col_lives[kCols];
  T value[kRows][kCols];

  // The same elements of a plane: read before a product, they are there when the product is.
  struct Others {
    T at[kRows][kCols];
  };
  DEV Others of(const T* plane) const {
    Others found;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j) found.at[i][j] = plane[row[i] * row_of(kN) + col[j]];
    return found;
  }
  // body(row, column, value, i, j)
  template <class Body>
  DEV void each(Body body) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j)
        if (row_lives[i] && col_lives[j]) body(row[i], col[j], value[i][j], i, j);
  }
  DEV void set_row(int i, int at, int end) { row_lives[i] = at < end, row[i] = at < end ? at : end - 1; }
  DEV void set_col(int j, int at) { col_lives[j] = at < kN, col[j] = least(at, kN - 1); }
};

template <class T>
struct alignas(2 * sizeof(T)) Two {
  T v[2];
};

}  // namespace mtmlk
