// Linear layers of many tasks.
//
//   forward   y[t] = f(x[t] W[t]^T + b[t])                       x[t] [N, I], W[t] [O, I], b[t] [O]
//   backward  g = dy f'(z),  dx = g W,  dW = g^T x,  db = sum_n g
// where one W or b may stand for all tasks: its gradient is then a sum over them. Units of work are panels of columns of
// a task, so every sum runs in an order that one task's sizes fix. Weights are packed a panel at a time, in the thread
// that needs it; tensors of the caller may lie at any address.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/pointwise.h"
#include "mtml/program.h"
#include "mtml/sizes.h"
#include "simd/gemm.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "simd/vmath.h"
#include "runtime/stops.h"
#include "runtime/crew.h"

namespace mtmlk {
namespace {

constexpr int64_t kUnitRows = 1024;  // of a product that share one packed panel
constexpr int64_t kTileRows = 192;   // whose sums lie in the first-level cache
constexpr int64_t kDepthRows = 256;  // rows of x packed together for dW
constexpr int64_t kTileOutputs = 64;

// What a product is turned into on its way to memory: f(z) or, with `by`, by f'(z).
template <class T>
struct Epilogue {
  int kind;  // Act, or -1: the product itself
  T c0, c1;
  const T* by;  // like the result
};

template <class T, int kKind>
void store_tile(const Epilogue<T>& e, const T* sums, int64_t width, int64_t rows, int64_t columns, int64_t ld, T* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; i += Simd<T>::kLanes) {
      const int64_t left = columns - i;
      VecOf<T> value = load<T>(sums + r * width + i);
      if constexpr (kKind >= 0) {
        const Jet<VecOf<T>> jet = act_jet<VectorMath<T>>(kKind, value, e.c0, e.c1);
        value = jet.value;
        if (e.by) {
          const VecOf<T> by = load_some<T>(e.by + r * ld + i, left);
          value = kKind == kRelu ? (jet.slope == T(0) ? VecOf<T>{} : by) : by * jet.slope;
        }
      }
      store_some<T>(to + r * ld + i, value, left);
    }
}

// Columns [0, columns) of `rows` rows, ld apart; sums [rows, width] are the product's.
template <class T, int kKind = -1>
void store_product(const Epilogue<T>& e, const T* sums, int64_t width, int64_t rows, int64_t columns, int64_t ld,
                   T* to) {
  if constexpr (kKind < kActCount) {
    if (e.kind == kKind) return store_tile<T, kKind>(e, sums, width, rows, columns, ld, to);
    store_product<T, kKind + 1>(e, sums, width, rows, columns, ld, to);
  }
}

// c[g] = epilogue(a[g] b[g] + bias[g])      a [groups, rows, depth], c [groups, rows, columns]
template <class T>
struct GroupProduct {
  int64_t groups, rows, depth, columns;
  const T *a, *b;
  int64_t b_step;  // from one group's matrix to the next, 0: one for all
  bool turned;     // it is stored [columns, depth], else [depth, columns]
  const T* bias;   // [columns], or nullptr
  int64_t bias_step;
  T* c;
  Epilogue<T> epilogue;
};

template <class T>
void pack_columns(const GroupProduct<T>& p, const T* b, int64_t from, int64_t width, T* to) {
  if (p.turned) return transpose_into<T>(b + from * p.depth, p.columns - from, p.depth, to, width);
  for (int64_t k = 0; k < p.depth; ++k)
    for (int64_t i = 0; i < width; i += Simd<T>::kLanes)
      store<T>(to + k * width + i, load_some<T>(b + k * p.columns + from + i, p.columns - from - i));
}

// Rows [row, row + rows) of a group's panel.
template <class T>
void product_unit(const GroupProduct<T>& p, int64_t group, int64_t from, int64_t row, int64_t rows, T* scratch) {
  const int64_t left = round_up(p.columns - from, Simd<T>::kLanes);
  const int64_t width = left < kPanelWidth<T> ? left : kPanelWidth<T>;
  const int64_t columns = p.columns - from < width ? p.columns - from : width;
  T *const sums = scratch, *const bias = sums + kTileRows * kPanelWidth<T>, *const packed = bias + kPanelWidth<T>;
  pack_columns<T>(p, p.b + group * p.b_step, from, width, packed);
  for (int64_t i = 0; p.bias && i < width; i += Simd<T>::kLanes)
    store<T>(bias + i, load_some<T>(p.bias + group * p.bias_step + from + i, p.columns - from - i));
  for (int64_t r = row; r < row + rows; r += kTileRows) {
    const int64_t some = row + rows - r < kTileRows ? row + rows - r : kTileRows, at = group * p.rows + r;
    Gemm<T> g = {sums,
                 width,
                 p.bias ? bias : nullptr,
                 0,
                 T(1),
                 nullptr,
                 0,
                 {p.a + at * p.depth, p.depth, packed, width, p.depth},
                 {}};
    panel_any<T, false>(int(width / Simd<T>::kLanes), some, g);
    Epilogue<T> e = p.epilogue;
    if (e.by) e.by += at * p.columns + from;
    store_product<T>(e, sums, width, some, columns, p.columns, p.c + at * p.columns + from);
  }
}

template <class T>
void run_product(const GroupProduct<T>& p, const Crew& crew) {
  const int64_t panels = (p.columns + kPanelWidth<T> - 1) / kPanelWidth<T>;
  const int64_t chunks = (p.rows + kUnitRows - 1) / kUnitRows;
  share(crew, p.groups * panels * chunks, [&](int64_t u, int slot) {
    const int64_t row = u % chunks * kUnitRows, left = p.rows - row;
    product_unit<T>(p, u / chunks / panels, u / chunks % panels * kPanelWidth<T>, row,
                    left < kUnitRows ? left : kUnitRows, own_scratch<T>(crew, slot));
  });
}

// c[g] = a[g]^T b[g]      a [groups, depth, rows], b [groups, depth, columns], c [groups, rows, columns]
template <class T>
struct GroupGradient {
  int64_t groups, depth, rows, columns;
  const T *a, *b;
  T* c;
};

// Rows [row, row + rows) of a panel of c.
template <class T>
void gradient_unit(const GroupGradient<T>& p, int64_t group, int64_t from, int64_t row, int64_t rows, T* scratch) {
  const int64_t left = round_up(p.columns - from, Simd<T>::kLanes);
  const int64_t width = left < kPanelWidth<T> ? left : kPanelWidth<T>;
  T *const sums = scratch, *const packed = sums + kTileOutputs * kPanelWidth<T>;
  const T *const a = p.a + group * p.depth * p.rows + row, *const b = p.b + group * p.depth * p.columns + from;
  for (int64_t k = 0; k < p.depth; k += kDepthRows) {
    const int64_t some = p.depth - k < kDepthRows ? p.depth - k : kDepthRows;
    for (int64_t r = 0; r < some; ++r)
      for (int64_t i = 0; i < width; i += Simd<T>::kLanes)
        store<T>(packed + r * width + i, load_some<T>(b + (k + r) * p.columns + i, p.columns - from - i));
    Gemm<T> g = {
        sums, width, k ? sums : nullptr, width, T(1), nullptr, 0, {a + k * p.rows, p.rows, packed, width, some}, {}};
    panel_any<T, true>(int(width / Simd<T>::kLanes), rows, g);
  }
  T* const c = p.c + (group * p.rows + row) * p.columns + from;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width && from + i < p.columns; i += Simd<T>::kLanes)
      store_some<T>(c + r * p.columns + i, load<T>(sums + r * width + i), p.columns - from - i);
}

template <class T>
void run_gradient(const GroupGradient<T>& p, const Crew& crew) {
  const int64_t panels = (p.columns + kPanelWidth<T> - 1) / kPanelWidth<T>;
  const int64_t chunks = (p.rows + kTileOutputs - 1) / kTileOutputs;
  share(crew, p.groups * panels * chunks, [&](int64_t u, int slot) {
    const int64_t row = u % chunks * kTileOutputs, left = p.rows - row;
    gradient_unit<T>(p, u / chunks / panels, u / chunks % panels * kPanelWidth<T>, row,
                     left < kTileOutputs ? left : kTileOutputs, own_scratch<T>(crew, slot));
  });
}

// Sums of the rows of every group, in parts: long chains of additions lose digits.
template <class T>
void run_row_sums(const T* src, int64_t groups, int64_t rows, int64_t columns, T* to, const Crew& crew) {
  share(crew, groups, [&](int64_t g, int) {
    for (int64_t i = 0; i < columns && !stops(crew.watch); i += Simd<T>::kLanes) {
      VecOf<T> total = {};
      for (int64_t row = 0; row < rows; row += kTileOutputs) {
        VecOf<T> sum = {};
        for (int64_t r = row; r < rows && r < row + kTileOutputs; ++r)
          sum += load_some<T>(src + (g * rows + r) * columns + i, columns - i);
        total += sum;
      }
      store_some<T>(to + g * columns + i, total, columns - i);
    }
  });
}

// g = dy f'(z) from y, for activations whose slope the output tells.
template <class T, int kKind = 0>
void slope_by_output(int kind, const T* y, const T* dy, int64_t n, T c0, T* g) {
  if constexpr (kKind < kActCount) {
    if (kind != kKind) return slope_by_output<T, kKind + 1>(kind, y, dy, n, c0, g);
    for (int64_t i = 0; i < n; i += Simd<T>::kLanes) {
      const VecOf<T> a = load_some<T>(y + i, n - i), d = load_some<T>(dy + i, n - i);
      // A selection for relu: 0 times an infinite gradient would be NaN where PyTorch has 0.
      const VecOf<T> value =
          kKind == kRelu ? (a <= T(0) ? VecOf<T>{} : d) : d * slope_of_output<VectorMath<T>>(kKind, a, c0);
      store_some<T>(g + i, value, n - i);
    }
  }
}

template <class T>
GroupProduct<T> forward_product(const MtmlkTaskLinear& c) {
  const bool one = c.weights == 1 && (!c.bias || c.biases == 1);  // then all rows are alike
  GroupProduct<T> p = {};
  p.groups = one ? 1 : c.tasks, p.rows = one ? c.tasks * c.rows : c.rows, p.depth = c.inputs, p.columns = c.outputs;
  p.a = static_cast<const T*>(c.x), p.b = static_cast<const T*>(c.weight), p.turned = true;
  p.b_step = c.weights == 1 ? 0 : c.outputs * c.inputs;
  p.bias = static_cast<const T*>(c.bias), p.bias_step = c.biases == 1 ? 0 : c.outputs;
  p.epilogue = {c.activation, T(c.c0), T(c.c1), nullptr};
  return p;
}

template <class T>
void task_linear_forward(const MtmlkTaskLinear& c, const Crew& crew) {
  GroupProduct<T> p = forward_product<T>(c);
  p.c = static_cast<T*>(c.y);
  run_product<T>(p, crew);
}

// Gradients at z  # [T, N, O]
template <class T>
void task_linear_slopes(const MtmlkTaskLinear& c, T* g, const Crew& crew) {
  const T* dy = static_cast<const T*>(c.grad);
  if (best_act_mode(c.activation, c.c0) != kInPlace) {
    GroupProduct<T> p = forward_product<T>(c);
    p.c = g, p.epilogue.by = dy;
    return run_product<T>(p, crew);
  }
  const int64_t n = c.tasks * c.rows * c.outputs, piece = int64_t(1) << 14, pieces = (n + piece - 1) / piece;
  const T* y = static_cast<const T*>(c.y);
  share(crew, pieces, [&](int64_t i, int) {
    const int64_t at = i * piece, some = n - at < piece ? n - at : piece;
    slope_by_output<T>(c.activation, y + at, dy + at, some, T(c.c0), g + at);
  });
}

// `slopes` [T, N, O]: memory for the gradients at z, where there is an activation.
template <class T>
void task_linear_backward(const MtmlkTaskLinear& c, void* slopes, const Crew& crew) {
  const T *x = static_cast<const T*>(c.x), *g = static_cast<const T*>(c.grad);
  if (c.activation >= 0) {
    task_linear_slopes<T>(c, static_cast<T*>(slopes), crew);
    g = static_cast<const T*>(slopes);
  }
  const int64_t groups = c.weights == 1 ? 1 : c.tasks, all = c.tasks * c.rows;
  if (c.dx) {
    GroupProduct<T> p = {};
    p.groups = groups, p.rows = all / groups, p.depth = c.outputs, p.columns = c.inputs;
    p.a = g, p.b = static_cast<const T*>(c.weight), p.b_step = c.outputs * c.inputs;
    p.c = static_cast<T*>(c.dx), p.epilogue.kind = -1;
    run_product<T>(p, crew);
  }
  if (c.dw) run_gradient<T>({groups, all / groups, c.outputs, c.inputs, g, x, static_cast<T*>(c.dw)}, crew);
  if (c.db) run_row_sums<T>(g, c.biases, all / c.biases, c.outputs, static_cast<T*>(c.db), crew);
}

template <class T>
int64_t task_linear_bytes(const MtmlkTaskLinear& c) {
  const int64_t depth = c.inputs > c.outputs ? c.inputs : c.outputs;
  const int64_t product = kTileRows + 1 + depth, gradient = kTileOutputs + kDepthRows;
  return (product > gradient ? product : gradient) * kPanelWidth<T> * int64_t(sizeof(T));
}

}  // namespace
}  // namespace mtmlk
