// Meta-gradients of weights in low-rank form.
//
//   dW [I, O] = sum over tasks and lambda_0's factors of A^T D
// one product whose long side are the rows of all tasks, cut into units of inputs x outputs that threads share. A unit
// takes the rows in order, those of a few tasks (up to kChain) at once, so the bits do not depend on threads. It copies
// its rows first: read where they lie, rows that are a power of two apart would share a few sets of the first-level
// cache.
#pragma once

#include <stdint.h>

#include "mtml/sizes.h"
#include "simd/dots.h"
#include "simd/gemm.h"
#include "simd/layout.h"
#include "inner_loop/plan/plan.h"
#include "layers/low_rank.h"

namespace mtmlk {
namespace {

constexpr int64_t kUnitInputs = 200;   // x kChain floats: 200 KB of the second-level cache
constexpr int64_t kUnitOutputs = 256;  // likewise
constexpr int64_t kLine = 64;          // bytes

// Tasks whose rows are summed at once, and how many are in flight before their rows are: enough that threads seldom
// wait for each other, few enough that their inputs and planes (0.6 MB each in omniglot_mlp) are in the last cache
// still.
inline int64_t summed_tasks(const Plan& p) { return p.task_rows < kChain && p.task_rows ? kChain / p.task_rows : 1; }

template <class T>
int64_t wave_tasks(const Plan& p, int64_t tasks, int threads) {
  constexpr int64_t kBytes = 64 << 20;
  const int64_t most = 8 * threads, least = 2 * threads, fit = kBytes / (p.task_size * int64_t(sizeof(T)) + 1);
  const int64_t wave = round_up(fit > most ? most : fit < least ? least : fit, summed_tasks(p));
  return wave < tasks ? wave : tasks;
}

template <class T>
struct LowRankUnit {
  const ValuePlan* layer;
  int64_t inputs;          // of the layer
  int64_t i0, i1, o0, o1;  // outputs are padded
};

struct UnitSize {
  int64_t inputs, outputs;  // at most
};

// Calls body(unit) for all units of all layers. Whole tiles of inputs, whole panels of outputs.
template <class T, class Body>
void each_low_rank_unit(const Plan& p, UnitSize most, Body body) {
  constexpr int64_t kStep = kPanelVecs * Simd<T>::kLanes, kTile = tile_rows(kPanelVecs);
  const auto part = [](int64_t n, int64_t most, int64_t unit) {
    const int64_t parts = (n + most - 1) / most;
    return round_up((n + parts - 1) / parts, unit);
  };
  for (int64_t i = 0; i < p.n_values; ++i) {
    const ValuePlan& v = p.values[i];
    if (!v.live || v.op != kLinear || !p.params[v.weight].low) continue;
    const int64_t inputs = p.params[v.weight].cols, outputs = v.ld;
    const int64_t step_i = part(inputs, most.inputs, kTile), step_o = part(outputs, most.outputs, kStep);
    for (int64_t o = 0; o < outputs; o += step_o)
      for (int64_t at = 0; at < inputs; at += step_i)
        body(LowRankUnit<T>{&v, inputs, at, at + step_i < inputs ? at + step_i : inputs, o,
                            o + step_o < outputs ? o + step_o : outputs});
  }
}

template <class T>
int64_t count_units(const Plan& p, UnitSize most) {
  int64_t units = 0;
  each_low_rank_unit<T>(p, most, [&](const LowRankUnit<T>&) { ++units; });
  return units;
}

// Units for all threads: of omniglot_mlp's sums there are six as large as the cache admits, and 16 threads took as long as
// six. Smaller ones copy more for each product, from 1 % to 4 % of its multiply-adds, no sum changes its order.
template <class T>
UnitSize unit_size(const Plan& p, int threads) {
  constexpr int64_t kLeast = 48, kEach = 2;
  UnitSize most = {kUnitInputs, kUnitOutputs};
  while (count_units<T>(p, most) < kEach * threads && (most.inputs >= 2 * kLeast || most.outputs >= 2 * kLeast)) {
    int64_t& larger = most.inputs > most.outputs ? most.inputs : most.outputs;
    larger /= 2;
  }
  return most;
}

// Inputs are rows an odd number of cache lines apart; panels of outputs have a line between them.
template <class T>
int64_t inputs_ld(int64_t inputs) {
  constexpr int64_t kUnit = kLine / int64_t(sizeof(T));
  return (round_up(inputs, kUnit) / kUnit | 1) * kUnit;
}

template <class T>
int64_t outputs_room(int64_t outputs) {
  constexpr int64_t kStep = kPanelVecs * Simd<T>::kLanes, kUnit = kLine / int64_t(sizeof(T));
  return kChain * outputs + (outputs / kStep + 1) * kUnit;
}

// Elements that a thread needs for its copies.
template <class T>
int64_t low_rank_scratch() {
  constexpr int64_t kStep = kPanelVecs * Simd<T>::kLanes, kTile = tile_rows(kPanelVecs);
  return kChain * inputs_ld<T>(kUnitInputs + kTile) + round_up(outputs_room<T>(kUnitOutputs + kStep), 64);
}

// Up to kChain rows that lie in several runs.
template <class T>
struct RowRuns {
  RowsOf<T> a[kChain], d[kChain];
  int64_t runs, rows;
};

template <class T>
void copy_inputs(const RowRuns<T>& runs, const LowRankUnit<T>& u, int64_t ld, T* to) {
  for (int64_t run = 0; run < runs.runs; ++run)
    for (int64_t r = 0; r < runs.a[run].count; ++r, to += ld) {
      const T* from = runs.a[run].at + r * runs.a[run].ld;
      for (int64_t i = u.i0; i < u.i1; i += Simd<T>::kLanes) store<T>(to + i - u.i0, load_some<T>(from + i, u.i1 - i));
    }
}

template <class T>
void copy_outputs(const RowRuns<T>& runs, const LowRankUnit<T>& u, T* to) {
  constexpr int64_t kLanes = Simd<T>::kLanes, kStep = kPanelVecs * kLanes;
  int64_t row = 0;
  for (int64_t run = 0; run < runs.runs; ++run)
    for (int64_t r = 0; r < runs.d[run].count; ++r, ++row) {
      const T* from = runs.d[run].at + r * runs.d[run].ld;
      T* panel = to;
      for (int64_t o = u.o0; o < u.o1; o += kStep) {
        const int64_t width = u.o1 - o < kStep ? u.o1 - o : kStep;
        for (int64_t j = 0; j < width; j += kLanes) store<T>(panel + row * width + j, load<T>(from + o + j));
        panel += runs.rows * width + kLine / int64_t(sizeof(T));
      }
    }
}

// The packed dW [i0 ... i1, o0 ... o1] (+)= A^T D of the runs.
template <class T>
void add_runs(const RowRuns<T>& runs, const LowRankUnit<T>& u, bool add, T* grad, T* scratch) {
  constexpr int64_t kLanes = Simd<T>::kLanes, kStep = kPanelVecs * kLanes, kTile = tile_rows(kPanelVecs);
  const int64_t ld = inputs_ld<T>(u.i1 - u.i0);
  T *a = scratch, *d = scratch + kChain * inputs_ld<T>(kUnitInputs + kTile);
  copy_inputs<T>(runs, u, ld, a);
  copy_outputs<T>(runs, u, d);
  for (int64_t i = u.i0; i < u.i1; i += kTile) {
    const T* panel = d;
    for (int64_t o = u.o0; o < u.o1; o += kStep) {
      const int64_t width = u.o1 - o < kStep ? u.o1 - o : kStep;
      T* c = grad + o * u.inputs + i * width;
      Gemm<T> g = {c, width, add ? c : nullptr, width, T(1), nullptr, 0, {a + i - u.i0, ld, panel, width, runs.rows},
                   {}};
      panel_any<T, true>(int(width / kLanes), u.i1 - i < kTile ? u.i1 - i : kTile, g);
      panel += runs.rows * width + kLine / int64_t(sizeof(T));
    }
  }
}

template <class T>
void clear_unit(const LowRankUnit<T>& u, T* grad) {
  constexpr int64_t kStep = kPanelVecs * Simd<T>::kLanes;
  for (int64_t o = u.o0; o < u.o1; o += kStep) {
    const int64_t width = u.o1 - o < kStep ? u.o1 - o : kStep;
    fill_zero<T>(grad + o * u.inputs + u.i0 * width, (u.i1 - u.i0) * width);
  }
}

// One unit over lambda_0's factors of tasks [first, last); factors(task, take) gives those of a task, in order.
template <class T, class Factors>
void sum_unit(const LowRankUnit<T>& u, int64_t first, int64_t last, int64_t at_once, T* grad, T* scratch,
              Factors factors) {
  bool add = first > 0;
  RowRuns<T> runs;
  runs.runs = runs.rows = 0;
  const auto flush = [&] {
    if (runs.rows == 0) return;
    add_runs<T>(runs, u, add, grad, scratch);
    add = true, runs.runs = runs.rows = 0;
  };
  for (int64_t t = first; t < last; ++t) {
    factors(t, [&](const Factor<T>& f) {
      if (!applies(f, *u.layer)) return;
      RowsOf<T> a = factor_inputs(f, *u.layer), d = factor_outputs(f, *u.layer);
      while (a.count > 0) {
        const int64_t room = kChain - runs.rows, n = a.count < room ? a.count : room;
        runs.a[runs.runs] = {a.at, a.ld, n}, runs.d[runs.runs] = {d.at, d.ld, n};
        ++runs.runs, runs.rows += n;
        a = {a.at + n * a.ld, a.ld, a.count - n}, d = {d.at + n * d.ld, d.ld, d.count - n};
        if (runs.rows == kChain) flush();
      }
    });
    if ((t + 1) % at_once == 0) flush();
  }
  flush();
  if (!add) clear_unit<T>(u, grad);  // no task has a factor
}

}  // namespace
}  // namespace mtmlk
