// All tasks of a linear head's call.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "mtml/program.h"
#include "simd/simd.h"
#include "runtime/carver.h"
#include "runtime/team.h"
#include "runtime/threads.h"
#include "runtime/watch.h"
#include "head_inner_loop/chain.h"
#include "head_inner_loop/loss.h"
#include "head_inner_loop/reverse.h"
#include "head_inner_loop/task.h"

namespace mtmlk {
namespace {

inline int head_threads(const MtmlkHeadCall& c, int64_t most) {
  const int64_t small = c.steps * c.support * c.support * c.classes, pulled = c.query * c.classes * c.features;
  const int64_t work = c.tasks * (c.support * (c.support + c.classes) * c.features + 2 * pulled + small);
  return threads_for(double(work), c.threads < most ? c.threads : int(most));
}

// The columns of one thread: whole panels, as even as they go.
template <class T>
int64_t head_column(int64_t features, int64_t part, int64_t parts) {
  const int64_t width = kPanelVecs * Simd<T>::kLanes, panels = (features + width - 1) / width;
  const int64_t at = panels * part / parts * width;
  return at < features ? at : features;
}

template <class T>
HeadTables<T> head_tables(Carver& c, const MtmlkHeadCall& call) {
  const int64_t n = call.steps * call.classes;
  HeadTables<T> tables = {};
  tables.rate = c.take<T>(call.rate_groups * n), tables.keep = c.take<T>(call.rate_groups * n);
  tables.left = c.take<T>(call.rate_groups * (n + call.classes));
  return tables;
}

template <class T>
void fill_head_tables(const MtmlkHeadCall& call, const HeadTables<T>& to) {
  const T *rates = static_cast<const T*>(call.rates), m = T(call.decay + call.proximal);
  const int64_t C = call.classes, K = call.steps;
  for (int64_t g = 0; g < call.rate_groups; ++g) {
    T* left = to.left + g * (K + 1) * C;
    for (int64_t c = 0; c < C; ++c) left[c] = T(1);
    for (int64_t i = 0; i < K * C; ++i) {
      const T alpha = rates[g * K * C + i], kept = T(1) - alpha * m;
      to.rate[g * K * C + i] = alpha, to.keep[g * K * C + i] = kept;
      left[i + C] = call.decay != 0 ? kept * left[i] + alpha * T(call.proximal) : T(1);
    }
  }
}

template <class T>
void run_head_task(HeadTask<T>& task, int64_t t) {
  const MtmlkHeadCall& call = *task.call;
  const int64_t S = call.support, Q = call.query, C = call.classes;
  const auto labels = [&](const void* y, const MtmlkLoss& loss, int64_t samples) -> const void* {
    if (loss.kind == kCrossEntropy) return static_cast<const int64_t*>(y) + t * samples;
    return static_cast<const T*>(y) + t * samples * C;
  };
  const T *sm = static_cast<const T*>(call.support_mask), *qm = static_cast<const T*>(call.query_mask);
  task.measure(t);
  head_targets<T>(call.support_loss, S, labels(call.support_y, call.support_loss, S), sm ? sm + t * S : nullptr,
                  task.support_loss);
  if (call.query_y)
    head_targets<T>(call.query_loss, Q, labels(call.query_y, call.query_loss, Q), qm ? qm + t * Q : nullptr,
                    task.query_loss);
  task.adapt(t);
  task.judge(t);
  if (!call.carry) return;
  task.reverse(t);
  head_carry<T>(task, static_cast<T*>(call.carry) + t * head_carry_size(call));
}

template <class T>
int64_t head_loop_bytes(const MtmlkHeadCall& call) {
  Carver c = {nullptr, 0};
  head_tables<T>(c, call);
  HeadTask<T> task = {};
  for (int i = 0; i < head_threads(call, call.tasks); ++i) task.carve(c, call);
  return c.used;
}

template <class T>
void run_head_loop(const MtmlkHeadCall& call, void* workspace, Watch* watch) {
  const int threads = head_threads(call, call.tasks);
  Carver c = {static_cast<char*>(workspace), 0};
  const HeadTables<T> tables = head_tables<T>(c, call);
  fill_head_tables<T>(call, tables);
  Carver size = {nullptr, 0};
  HeadTask<T> probe = {};
  probe.carve(size, call);
  each_piece(threads, call.tasks, watch, [&](int64_t t, int slot) {
    Carver own = {c.base + c.used + slot * size.used, 0};
    HeadTask<T> task = {};
    task.carve(own, call);
    task.call = &call, task.tables = &tables, task.watch = watch;
    run_head_task<T>(task, t);
  });
}

template <class T>
int64_t head_chain_bytes(const MtmlkHeadCall& call) {
  const int parts = head_threads(call, call.features);
  Carver c = {nullptr, 0};
  HeadChain<T> chain = {};
  for (int i = 0; i < parts; ++i)
    chain.carve(c, call, head_column<T>(call.features, i, parts), head_column<T>(call.features, i + 1, parts));
  return c.used;
}

// db and the rates' gradients: sum_t scale_t carry_t
template <class T>
void head_small_sums(const MtmlkHeadCall& call) {
  const int64_t carry_size = head_carry_size(call);
  const int64_t skip = carry_size - call.classes - call.rate_groups * call.steps * call.classes;
  const T *carry = static_cast<const T*>(call.carry), *scales = static_cast<const T*>(call.grad_loss);
  T *to_bias = static_cast<T*>(call.grad_bias), *to_rates = static_cast<T*>(call.grad_rates);
  for (int64_t i = skip; i < carry_size; ++i) {
    T* to = i < skip + call.classes ? to_bias ? to_bias + (i - skip) : nullptr
            : to_rates              ? to_rates + (i - skip - call.classes)
                                    : nullptr;
    if (!to) continue;
    T sum = 0;
    for (int64_t t = 0; t < call.tasks; ++t) sum += (scales ? scales[t] : T(1)) * carry[t * carry_size + i];
    *to = sum;
  }
}

template <class T>
void run_head_chain(const MtmlkHeadCall& call, void* workspace, Watch* watch) {
  const int parts = head_threads(call, call.features);
  char* base = static_cast<char*>(workspace);
  if (call.grad_support_x || call.grad_query_x || call.grad_weight) {
    each_piece(parts, parts, watch, [&](int64_t i, int) {
      Carver c = {nullptr, 0};
      HeadChain<T> chain = {};
      for (int before = 0; before <= int(i); ++before) {  // the pieces differ in size; only this one is placed
        if (before == i) c.base = base;
        chain.carve(c, call, head_column<T>(call.features, before, parts),
                    head_column<T>(call.features, before + 1, parts));
      }
      chain.watch = watch;
      chain.run();
    });
  }
  head_small_sums<T>(call);
}

}  // namespace
}  // namespace mtmlk
