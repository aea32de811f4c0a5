// The linear layers before the head losses.
//
//   Z = X W^T + b            X [rows, D], W [C, D] of all heads one below the other, Z [rows, ld]
//   dX = G W'                G = dL/dZ with every head's own loss, W' its rows times their head's cotangent
//   dW = by G^T X            db = by sum_n G
// Columns of Z go to threads in panels, and so do those of dX and the rows of dW: no two threads add to one element,
// and every sum runs in an order that the sizes fix. Weights are packed a panel at a time, in the thread that needs it.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/sizes.h"
#include "simd/gemm.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "runtime/stops.h"
#include "runtime/team.h"
#include "linear_multihead_loss/call.h"

namespace mtmlk {
namespace {

// Rows of X and G packed together, rows of W packed together, panels of dW in one unit. With 16 columns a panel, packed
// panels are to lie in the first-level cache side by side (of 16 heads' three products, dX 6.2 -> 4.7 ms and dW 6.8 ->
// 5.5 ms from 512, 512 and 4); panels of 64 columns come from the second in any case.
#if defined(MTMLK_ISA_AVX512)
constexpr int64_t kRowBlock = 512, kDepth = 512, kPanelGroup = 4;
#else
constexpr int64_t kRowBlock = 192, kDepth = 256, kPanelGroup = 16;
#endif
constexpr int64_t kRowGroup = 256;  // rows of dX in one unit

template <class T>
constexpr int64_t kPanel = kPanelVecs * Simd<T>::kLanes;

template <class T>
int64_t panels_of(int64_t n) {
  return (n + kPanel<T> - 1) / kPanel<T>;
}

template <class T>
int64_t panel_width(int64_t n, int64_t panel) {
  const int64_t left = round_up(n, Simd<T>::kLanes) - panel * kPanel<T>;
  return left < kPanel<T> ? left : kPanel<T>;
}

// Which head a column of Z belongs to; columns are asked for in order.
struct HeadOf {
  const LinearMultiheadCall& call;
  int64_t head = 0;
  bool find(int64_t column) {
    while (head < call.linear->n_heads && column >= call.starts[head + 1]) ++head;
    return head < call.linear->n_heads;
  }
  template <class T>
  const T* weight(int64_t column) const {
    return static_cast<const T*>(call.linear->weights[head]) + (column - call.starts[head]) * call.linear->features;
  }
};

template <class T>
T* scratch_of(const LinearMultiheadCall& call, int slot) {
  return reinterpret_cast<T*>(static_cast<char*>(call.scratch) + slot * call.thread_bytes);
}

template <class Body>
void share(const LinearMultiheadCall& call, int64_t n, const Body& body) {
  each_piece(call.threads, n, call.watch, body);
}

// to [D, width] <- W^T, and the biases [width]
template <class T>
void pack_panel(const LinearMultiheadCall& call, int64_t col, int64_t width, T* to, T* bias) {
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t depth = call.linear->features;
  HeadOf of{call};
  for (int64_t j = 0; j < width; j += kLanes) {
    const T* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t column = col + j + i;
      const bool there = of.find(column);
      rows[i] = there ? of.weight<T>(column) : nullptr;
      const T* b = there ? static_cast<const T*>(call.linear->biases[of.head]) : nullptr;
      bias[j + i] = b ? b[column - call.starts[of.head]] : T(0);
    }
    for (int64_t k = 0; k < depth; k += kLanes) {
      VecOf<T> v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) v[i] = rows[i] ? load_some<T>(rows[i] + k, depth - k) : VecOf<T>{};
      transpose_square<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (k + i < depth) store<T>(to + (k + i) * width + j, v[i]);
    }
  }
}

template <class T>
void linear_logits(const LinearMultiheadCall& call) {
  const int64_t depth = call.linear->features, panels = panels_of<T>(call.starts[call.linear->n_heads]);
  share(call, panels, [&](int64_t p, int slot) {
    const int64_t col = p * kPanel<T>, width = panel_width<T>(call.ld, p);
    T *const bias = scratch_of<T>(call, slot), *const packed = bias + kPanel<T>;
    pack_panel<T>(call, col, width, packed, bias);
    const T* x = static_cast<const T*>(call.linear->x) + call.row0 * depth;
    Gemm<T> g = {static_cast<T*>(call.z) + col,    call.ld, bias, 0, T(1), nullptr, 0,
                 {x, depth, packed, width, depth}, {}};
    panel_any<T, false>(int(width / Simd<T>::kLanes), call.rows, g);
  });
}

// --- dX ---

// to [columns, width] <- rows of W from `col` on, columns [from, from + width) of them, times their head's cotangent
template <class T>
void pack_weights(const LinearMultiheadCall& call, int64_t col, int64_t columns, int64_t from, int64_t width, T* to) {
  const int64_t depth = call.linear->features;
  HeadOf of{call};
  for (int64_t c = 0; c < columns; ++c) {
    of.find(col + c);
    const T* w = of.weight<T>(col + c);
    const T by = T(call.by[of.head]);
    for (int64_t i = 0; i < width; i += Simd<T>::kLanes)
      store<T>(to + c * width + i, by * load_some<T>(w + from + i, depth - from - i));
  }
}

template <class T>
void features_unit(const LinearMultiheadCall& call, int64_t panel, int64_t row, int64_t rows, T* packed) {
  const int64_t depth = call.linear->features, from = panel * kPanel<T>, width = panel_width<T>(depth, panel);
  const int64_t total = call.starts[call.linear->n_heads];
  T* const sums = packed + kDepth * kPanel<T>;
  for (int64_t col = 0; col < total; col += kDepth) {
    const int64_t columns = total - col < kDepth ? total - col : kDepth;
    pack_weights<T>(call, col, columns, from, width, packed);
    const T* g = static_cast<const T*>(call.z) + row * call.ld + col;
    Gemm<T> product = {sums, width, col ? sums : nullptr, width, T(1), nullptr, 0, {g, call.ld, packed, width, columns},
                       {}};
    panel_any<T, false>(int(width / Simd<T>::kLanes), rows, product);
  }
  T* dx = static_cast<T*>(call.dx) + (call.row0 + row) * depth + from;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width && from + i < depth; i += Simd<T>::kLanes)
      store_some<T>(dx + r * depth + i, load<T>(sums + r * width + i), depth - from - i);
}

template <class T>
void linear_features(const LinearMultiheadCall& call) {
  const int64_t panels = panels_of<T>(call.linear->features), groups = (call.rows + kRowGroup - 1) / kRowGroup;
  share(call, panels * groups, [&](int64_t u, int slot) {
    const int64_t row = u % groups * kRowGroup, rows = call.rows - row < kRowGroup ? call.rows - row : kRowGroup;
    features_unit<T>(call, u / groups, row, rows, scratch_of<T>(call, slot));
  });
}

// --- dW and db ---

template <class T>
T* packed_features(const LinearMultiheadCall& call, int64_t block, int64_t panel) {
  const int64_t panels = panels_of<T>(call.linear->features);
  return static_cast<T*>(call.shared) + (block * panels + panel) * kRowBlock * kPanel<T>;
}

template <class T>
void pack_features(const LinearMultiheadCall& call) {
  const int64_t depth = call.linear->features, panels = panels_of<T>(depth);
  const int64_t blocks = (call.rows + kRowBlock - 1) / kRowBlock;
  share(call, blocks * panels, [&](int64_t u, int) {
    const int64_t panel = u % panels, row0 = u / panels * kRowBlock, from = panel * kPanel<T>;
    const int64_t width = panel_width<T>(depth, panel);
    const int64_t rows = call.rows - row0 < kRowBlock ? call.rows - row0 : kRowBlock;
    const T* x = static_cast<const T*>(call.linear->x) + (call.row0 + row0) * depth + from;
    T* to = packed_features<T>(call, u / panels, panel);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < width; i += Simd<T>::kLanes)
        store<T>(to + r * width + i, load_some<T>(x + r * depth + i, depth - from - i));
  });
}

// to [rows, width] <- columns of G, and their sums
template <class T>
void pack_gradients(const T* g, int64_t ld, int64_t rows, int64_t width, T* to, T* sums) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t i = 0; i < width; i += kLanes) {
    VecOf<T> sum = {};
    for (int64_t r = 0; r < rows; ++r) {
      const VecOf<T> v = load<T>(g + r * ld + i);
      store<T>(to + r * width + i, v);
      sum += v;
    }
    store<T>(sums + i, load<T>(sums + i) + sum);
  }
}

template <class T>
MTMLK_INLINE void put(T* to, VecOf<T> v, int64_t n, bool add) {
  store_some<T>(to, add ? load_some<T>(to, n) + v : v, n);
}

// Columns [col, col + columns) of Z are rows of dW: write them, of panels [first, last), from `found` [columns, panel].
template <class T>
void put_weights(const LinearMultiheadCall& call, int64_t col, int64_t columns, int64_t first, int64_t last,
                 const T* found) {
  const int64_t depth = call.linear->features;
  HeadOf of{call};
  for (int64_t c = 0; c < columns; ++c) {
    of.find(col + c);
    T* dw = static_cast<T*>(call.dw[of.head]);
    if (!dw) continue;
    dw += (col + c - call.starts[of.head]) * depth;
    const T by = T(call.by[of.head]);
    for (int64_t p = first; p < last; ++p) {
      const int64_t from = p * kPanel<T>, width = panel_width<T>(depth, p);
      const T* row = found + (p - first) * kPanel<T> * kPanel<T> + c * width;
      for (int64_t i = 0; i < width && from + i < depth; i += Simd<T>::kLanes)
        put<T>(dw + from + i, by * load<T>(row + i), depth - from - i, call.add);
    }
  }
}

template <class T>
void put_biases(const LinearMultiheadCall& call, int64_t col, int64_t columns, const T* sums) {
  HeadOf of{call};
  for (int64_t c = 0; c < columns; ++c) {
    of.find(col + c);
    T* db = static_cast<T*>(call.db[of.head]);
    if (!db) continue;
    T& to = db[col + c - call.starts[of.head]];
    to = T(call.by[of.head]) * sums[c] + (call.add ? to : T(0));
  }
}

template <class T>
void weights_unit(const LinearMultiheadCall& call, int64_t col, int64_t first, T* found) {
  const int64_t depth = call.linear->features, panels = panels_of<T>(depth), total = call.starts[call.linear->n_heads];
  const int64_t last = first + kPanelGroup < panels ? first + kPanelGroup : panels;
  const int64_t columns = total - col < kPanel<T> ? total - col : kPanel<T>, width = round_up(columns, Simd<T>::kLanes);
  T* const packed = found + kPanelGroup * kPanel<T> * kPanel<T>;
  T* const sums = packed + kRowBlock * kPanel<T>;
  for (int64_t i = 0; i < width; ++i) sums[i] = T(0);
  for (int64_t row = 0; row < call.rows && !stops(call.watch); row += kRowBlock) {
    const int64_t rows = call.rows - row < kRowBlock ? call.rows - row : kRowBlock;
    pack_gradients<T>(static_cast<const T*>(call.z) + row * call.ld + col, call.ld, rows, width, packed, sums);
    for (int64_t p = first; p < last; ++p) {
      const int64_t wide = panel_width<T>(depth, p);
      T* to = found + (p - first) * kPanel<T> * kPanel<T>;
      const T* x = packed_features<T>(call, row / kRowBlock, p);
      Gemm<T> g = {to, wide, row ? to : nullptr, wide, T(1), nullptr, 0, {packed, width, x, wide, rows}, {}};
      panel_any<T, true>(int(wide / Simd<T>::kLanes), columns, g);
    }
  }
  put_weights<T>(call, col, columns, first, last, found);
  if (first == 0) put_biases<T>(call, col, columns, sums);
}

template <class T>
void linear_weights(const LinearMultiheadCall& call) {
  pack_features<T>(call);
  const int64_t groups = (panels_of<T>(call.linear->features) + kPanelGroup - 1) / kPanelGroup;
  const int64_t chunks = panels_of<T>(call.starts[call.linear->n_heads]);
  share(call, chunks * groups, [&](int64_t u, int slot) {
    weights_unit<T>(call, u / groups * kPanel<T>, u % groups * kPanelGroup, scratch_of<T>(call, slot));
  });
}

// Bytes: of a thread's scratch, and of what the threads share.
template <class T>
void linear_bytes(int64_t features, int64_t rows, int64_t* thread, int64_t* shared) {
  const int64_t panel = kPanel<T>, logits = (features + 1) * panel, to_x = (kDepth + kRowGroup) * panel;
  const int64_t to_w = (kPanelGroup * panel + kRowBlock + 1) * panel;
  const int64_t most = logits > to_x ? logits : to_x;
  *thread = (most > to_w ? most : to_w) * int64_t(sizeof(T));
  *shared = (rows + kRowBlock - 1) / kRowBlock * panels_of<T>(features) * kRowBlock * panel * int64_t(sizeof(T));
}

}  // namespace
}  // namespace mtmlk
