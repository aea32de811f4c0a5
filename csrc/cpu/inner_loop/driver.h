// All tasks of a call.
//
// Groups of a few tasks go to threads; where there are fewer groups, the threads that are left share the tasks' chunks.
// Sums over tasks run in task order within a group, and over the groups in order, so the bits do not depend on threads.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/sizes.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "runtime/carver.h"
#include "runtime/stops.h"
#include "runtime/team.h"
#include "runtime/watch.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/elementwise.h"
#include "layers/params.h"
#include "inner_loop/factors.h"
#include "inner_loop/low_rank_sum.h"
#include "inner_loop/runner.h"
#include "inner_loop/task.h"

namespace mtmlk {
namespace {

// What a thread works with, or the threads that share a task, in cache lines of its own: beside another's, or on a stack
// that writes there, every read would wait for the other core (23 of 179 us of a 25-task call on two).
template <class T>
struct alignas(128) Seat {
  MtmlkCall call;
  Shared<T> shared;
  Runner<T> runner;
  bool ready;
};

template <class T>
struct Layout {
  Seat<T>* seats;
  int64_t count;  // groups worked on at once
  bool alone;     // each packs theta_0 for itself
  T* groups;      // [groups, carry_cols] where the carry is summed
  T* losses;      // [tasks, losses_ld]
  int64_t losses_ld;
  int64_t wave;      // tasks whose planes are kept at once in low-rank form
  T* planes;         // [wave, task_size]
  Block<T>* passes;  // [wave, steps + 1]
  const T** inputs;  // [wave, steps + 1, n_inputs]
  T* scratch;        // [threads, low_rank_scratch]
};

// Small models are packed by every thread for itself: fetching lines that another core has just written cost 5 to 14 us
// of a 200 us call (1761 parameters) on a busy host, and no more than packing them again on a quiet one.
template <class T>
bool packs_alone(const Plan& p) {
  return p.full_size * int64_t(sizeof(T)) <= (64 << 10);
}

template <class T>
Layout<T> lay_out(Carver& c, const Plan& p, int64_t tasks, int threads, bool carry) {
  const Split split = split_tasks(p, tasks, threads);
  Layout<T> l = {};
  l.count = split.seats;
  l.alone = packs_alone<T>(p);
  l.losses_ld = round_up(p.steps + 1 + (p.query_steps ? p.steps : 0), 64 / int64_t(sizeof(T)));
  l.losses = c.take<T>(tasks * l.losses_ld);
  l.groups = carry && !p.carry_per_task ? c.take<T>(split.groups * p.carry_cols) : nullptr;
  if (p.low_rank) {
    const int64_t wave = l.wave = wave_tasks<T>(p, tasks, threads);
    l.planes = c.take<T>(wave * p.task_size);
    l.passes = c.take<Block<T>>(wave * (p.steps + 1));
    l.inputs = c.take<const T*>(wave * (p.steps + 1) * p.n_inputs);
    l.scratch = carry ? c.take<T>(threads * low_rank_scratch<T>()) : nullptr;
  }
  c.used = round_up(c.used, alignof(Seat<T>));
  l.seats = c.take<Seat<T>>(l.count);
  for (int64_t i = 0; i < l.count; ++i) {
    Seat<T> seat = {};
    if (i == 0 || l.alone) {
      seat.shared.packed = c.take<T>(p.full_size + p.full_t_size);
      seat.shared.rates = c.take<T>(p.lr_size);
      seat.shared.ones = c.take<T>(p.n_params);
      seat.shared.base = c.take<ParamPtr<T>>(p.n_params);
    }
    seat.shared.workers = split.workers;
    seat.runner.carve(c, p, seat.shared.workers);
    if (c.base) l.seats[i] = seat;
  }
  return l;
}

template <class T>
int64_t workspace_bytes(const Plan& p, int64_t tasks, int threads, bool carry) {
  Carver c = {nullptr, 0};
  lay_out<T>(c, p, tasks, threads, carry);
  return c.used;
}

template <class T>
void pack_one(const Plan& p, const MtmlkCall& call, Shared<T>& shared, int64_t i, int64_t part) {
  const ParamPlan& param = p.params[i];
  T* value = shared.packed + param.full;
  T* transposed = shared.packed + p.full_size + param.full_t;
  if (part == 0) shared.base[i] = {value, transposed}, shared.ones[i] = T(1);
  if (param.starts) return;  // each task packs its own
  pack_part<T>(param, part, static_cast<const T*>(call.params[i]), value, param.size_t_ ? transposed : nullptr);
}

template <class T>
void pack_params(const Plan& p, const MtmlkCall& call, Shared<T>& shared, int threads, Watch* watch) {
  int64_t parts = 0;
  for (int64_t i = 0; i < p.n_params; ++i) parts += parts_of<T>(p.params[i]);
  each_piece(threads, parts, watch, [&](int64_t part, int) {
    int64_t i = 0;
    for (; part >= parts_of<T>(p.params[i]); ++i) part -= parts_of<T>(p.params[i]);
    pack_one(p, call, shared, i, part);
  });
}

template <class T>
void pack_rates(const Plan& p, const MtmlkCall& call, Shared<T>& shared) {
  for (int64_t i = 0; i < p.n_lr; ++i) {
    const LrPlan& lr = p.lrs[i];
    const T* src = static_cast<const T*>(call.lr[i]);
    for (int64_t k = 0; k < lr.steps; ++k) {
      T* dst = shared.rates + lr.packed + k * lr.size;
      if (lr.elements)
        pack_param<T>(p.params[lr.param], src + k * p.params[lr.param].rows * p.params[lr.param].cols, dst);
      else
        dst[0] = src[k];
    }
  }
}

template <class T>
void run_group(const Plan& p, const Layout<T>& l, Seat<T>& seat, int64_t group, int64_t size) {
  const MtmlkCall& call = seat.call;
  Runner<T>& r = seat.runner;
  T* own = r.lambda;
  for (int64_t t = group * size; t < (group + 1) * size && t < call.tasks; ++t) {
    r.task = t;
    if (p.low_rank) {
      const int64_t slot = t % l.wave;
      r.states = l.planes + slot * p.task_size, r.passes = l.passes + slot * (p.steps + 1);
      r.inputs = l.inputs + slot * (p.steps + 1) * p.n_inputs;
    }
    r.losses = l.losses + t * l.losses_ld;
    T* row = own;
    if (call.carry && p.carry_per_task) row = static_cast<T*>(call.carry) + t * p.carry_room;
    const bool first = t == group * size;
    T* sum = l.groups ? l.groups + group * p.carry_cols : nullptr;
    if (sum && first) row = sum;
    r.run(row);
    if (call.carry && p.carry_per_task) fill_zero<T>(row + p.carry_cols, p.carry_room - p.carry_cols);
    if (sum && !first) affine<T>(row, p.carry_cols, T(1), T(0), true, sum);
  }
  r.lambda = own;
}

template <class T>
void sum_groups(const Plan& p, const MtmlkCall& call, const T* groups, int64_t n) {
  constexpr int64_t kPart = 4096;
  T* out = static_cast<T*>(call.carry);
  fill_zero<T>(out + p.carry_end, p.carry_room - p.carry_end);
  each_piece(call.threads, (p.carry_cols + kPart - 1) / kPart, nullptr, [&](int64_t part, int) {
    const int64_t start = part * kPart, end = start + kPart < p.carry_cols ? start + kPart : p.carry_cols;
    for (int64_t i = start; i < end; i += Simd<T>::kLanes) {
      VecOf<T> sum = load<T>(groups + i);
      for (int64_t g = 1; g < n; ++g) sum += load<T>(groups + g * p.carry_cols + i);
      store<T>(out + i, sum);
    }
  });
}

// Written at the end, by one thread: tasks side by side would fight for the cache lines of [K, T] all along.
template <class T>
void write_losses(const Plan& p, const MtmlkCall& call, const Layout<T>& l) {
  T *loss = static_cast<T*>(call.loss), *support = static_cast<T*>(call.support_losses);
  for (int64_t t = 0; t < call.tasks; ++t) {
    const T* own = l.losses + t * l.losses_ld;
    for (int64_t k = 0; support && k < p.steps; ++k) support[k * call.tasks + t] = own[k];
    for (int64_t k = 0; loss && k <= (p.query_steps ? p.steps : 0); ++k) loss[k * call.tasks + t] = own[p.steps + k];
  }
}

// lambda_0 of the low weights, over tasks [first, last) whose planes are at hand.
template <class T>
void sum_low_rank(const Plan& p, const MtmlkCall& call, const Layout<T>& l, int64_t first, int64_t last, Watch* watch) {
  const UnitSize most = unit_size<T>(p, call.threads);
  each_piece(call.threads, count_units<T>(p, most), watch, [&](int64_t unit, int slot) {
    LowRankUnit<T> own = {};
    int64_t nth = 0;
    each_low_rank_unit<T>(p, most, [&](const LowRankUnit<T>& u) {
      if (nth++ == unit) own = u;
    });
    T* scratch = l.scratch + slot * low_rank_scratch<T>();
    T* grad = static_cast<T*>(call.carry) + p.params[own.layer->weight].low_at;
    sum_unit<T>(own, first, last, summed_tasks(p), grad, scratch, [&](int64_t task, auto take) {
      each_factor<T>(p, call, l.passes + task % l.wave * (p.steps + 1), 0, nullptr, take);
    });
  });
}

template <class T>
void prepare(const Plan& p, const MtmlkCall& call, const Layout<T>& l, Seat<T>& seat, Watch* watch) {
  if (l.alone) {
    pack_params(p, call, seat.shared, 1, nullptr);
    pack_rates(p, call, seat.shared);
  }
  seat.call = call;
  seat.runner.plan = &p, seat.runner.call = &seat.call, seat.runner.shared = &seat.shared;
  seat.runner.watch = watch;
  seat.ready = true;
}

// Groups [first, last) of `size` tasks.
template <class T>
void run_groups(const Plan& p, const MtmlkCall& call, const Layout<T>& l, int64_t size, int64_t first, int64_t last,
                Watch* watch) {
  if (l.count == 1) {
    prepare(p, call, l, l.seats[0], watch);
    for (int64_t g = first; g < last && !stops(watch); ++g) run_group(p, l, l.seats[0], g, size);
    return;
  }
  for (int64_t i = 0; i < l.count; ++i) l.seats[i].ready = false;
  each_piece(int(l.count), last - first, watch, [&](int64_t g, int slot) {
    Seat<T>& seat = l.seats[slot];
    if (!seat.ready) prepare(p, call, l, seat, watch);
    run_group(p, l, seat, first + g, size);
  });
}

template <class T>
void run_inner_loop(const Plan& p, const MtmlkCall& call, void* workspace, Watch* watch) {
  Carver c = {static_cast<char*>(workspace), 0};
  Layout<T> l = lay_out<T>(c, p, call.tasks, call.threads, call.carry != nullptr);
  const Split split = split_tasks(p, call.tasks, call.threads);
  const int64_t groups = split.groups;
  if (!l.alone) {
    pack_params(p, call, l.seats[0].shared, call.threads, watch);
    pack_rates(p, call, l.seats[0].shared);
    for (int64_t i = 1; i < l.count; ++i) l.seats[i].shared = l.seats[0].shared;
  }
  const int64_t wave = p.low_rank ? l.wave : groups;  // of groups, which are single tasks in low-rank form
  for (int64_t g = 0; g < groups; g += wave) {
    const int64_t end = g + wave < groups ? g + wave : groups;
    run_groups(p, call, l, split.group, g, end, watch);
    if (stops(watch)) return;  // planes that were to be summed are not there
    if (p.low_rank && call.carry) sum_low_rank(p, call, l, g, end, watch);
  }
  if (l.groups) sum_groups(p, call, l.groups, groups);
  write_losses(p, call, l);
}

}  // namespace
}  // namespace mtmlk
