// From the carry to the gradients of the caller's tensors.
//
//   grads[p] = sum_t scale_t carry_t, unpacked; of what tasks bring of their own, grads[p][t] = scale_t carry_t
#pragma once

#include <stdint.h>

#include "mtml/update.h"
#include "simd/layout.h"
#include "simd/simd.h"
#include "runtime/team.h"
#include "runtime/threads.h"
#include "inner_loop/plan/plan.h"
#include "layers/params.h"

namespace mtmlk {
namespace {

constexpr int64_t kCarryRun = 64;  // columns that a thread sums at a time: of 1761 there are 28 runs, not six tensors

template <class T>
struct Carry {
  const Plan* plan;
  const T* rows;  // [tasks, carry_room], or the sum of the tasks
  int64_t tasks;
  const T* scale;
  int64_t stride;  // of the scales
  T* sum;          // [carry_room]

  const T* row(int64_t t) const { return rows + t * plan->carry_room; }
  T scale_of(int64_t t) const { return scale[t * stride]; }
};

template <int kVecs, class T>
MTMLK_INLINE void sum_columns(const Carry<T>& c, int64_t at) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  VecOf<T> total[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) total[v] = splat<T>(c.scale_of(0)) * load<T>(c.row(0) + at + v * kLanes);
  for (int64_t t = 1; t < c.tasks; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v)
      total[v] = multiply_add<T>(splat<T>(c.scale_of(t)), load<T>(c.row(t) + at + v * kLanes), total[v]);
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) store<T>(c.sum + at + v * kLanes, total[v]);
}

template <class T>
void sum_run(const Carry<T>& c, int64_t start, int64_t end) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  for (; start + 4 * kLanes <= end; start += 4 * kLanes) sum_columns<4>(c, start);
  for (; start < end; start += kLanes) sum_columns<1>(c, start);
}

inline bool is_apart(const Plan& p, const ParamPlan& param) { return param.starts || p.tasks_apart; }

// Whether columns [start, end) are of one tensor that tasks bring of their own.
inline bool lies_apart(const Plan& p, int64_t start, int64_t end) {
  if (p.tasks_apart) return end <= p.lambda_size;
  for (int64_t i = 0; p.starts && i < p.n_params; ++i) {
    const ParamPlan& param = p.params[i];
    if (param.starts && param.full <= start && end <= param.full + param.size) return true;
  }
  return false;
}

template <class T>
void sum_carry(const Carry<T>& c, int threads) {
  const Plan& p = *c.plan;
  const int64_t columns = p.needs & MTMLK_NEED_MOMENTS ? p.moments_at : p.carry_end;
  each_piece(threads, (columns + kCarryRun - 1) / kCarryRun, nullptr, [&](int64_t run, int) {
    const int64_t start = run * kCarryRun, end = start + kCarryRun < columns ? start + kCarryRun : columns;
    if (!lies_apart(p, start, end)) sum_run(c, start, end);
  });
}

// out [shape] = scale * packed
template <class T>
void unpack_scaled(const ParamPlan& param, const T* packed, T scale, T* out) {
  unpack_param<T>(param, packed, out);
  for (int64_t i = 0; i < param.rows * param.cols; ++i) out[i] *= scale;
}

template <class T>
void unpack_params(const Carry<T>& c, void* const* grads, int threads) {
  const Plan& p = *c.plan;
  const auto pieces_of = [&](int64_t i) {
    return !grads[i] ? 0 : is_apart(p, p.params[i]) ? c.tasks : parts_of<T>(p.params[i]);
  };
  int64_t pieces = 0;
  for (int64_t i = 0; i < p.n_params; ++i) pieces += pieces_of(i);
  each_piece(threads, pieces, nullptr, [&](int64_t piece, int) {
    int64_t i = 0;
    for (; piece >= pieces_of(i); ++i) piece -= pieces_of(i);
    const ParamPlan& param = p.params[i];
    const int64_t at = param.low ? param.low_at : param.full;
    T* out = static_cast<T*>(grads[i]);
    if (is_apart(p, param))
      unpack_scaled<T>(param, c.row(piece) + at, c.scale_of(piece), out + piece * param.rows * param.cols);
    else
      unpack_part<T>(param, piece, c.sum + at, out);
  });
}

template <class T>
void unpack_rates(const Carry<T>& c, void* const* grads) {
  const Plan& p = *c.plan;
  for (int64_t i = 0; grads && i < p.n_lr; ++i) {
    if (!grads[i]) continue;
    const LrPlan& lr = p.lrs[i];
    const T* packed = c.sum + lr.carry;
    T* out = static_cast<T*>(grads[i]);
    for (int64_t k = 0; k < lr.steps; ++k) {
      if (!lr.elements) {
        out[k] = packed[k];
        continue;
      }
      const ParamPlan& param = p.params[lr.param];
      unpack_param<T>(param, packed + k * lr.size, out + k * param.rows * param.cols);
    }
  }
}

template <class T>
void unpack_moments(const Carry<T>& c, void* const* grads, int threads) {
  const Plan& p = *c.plan;
  for (int64_t m = 0, nth = 0; grads && m < p.n_moments; ++m)
    for (int64_t i = 0; i < p.n_params; ++i) {
      const ParamPlan& param = p.params[i];
      if (!param.adapted) continue;
      T* out = static_cast<T*>(grads[nth++]);
      if (!out) continue;
      const int64_t at = p.moments_at + m * p.own_size + param.own;
      each_piece(threads, c.tasks, nullptr, [&](int64_t t, int) {
        unpack_scaled<T>(param, c.row(t) + at, c.scale_of(t), out + t * param.rows * param.cols);
      });
    }
}

template <class T>
void carry_to_grads(const Plan& p, const void* carry, int64_t rows, const void* scale, int64_t stride,
                    const CarryTargets& to, int most) {
  T* sum = static_cast<T*>(to.params[p.n_params]);  // from the caller
  const Carry<T> c = {&p, static_cast<const T*>(carry), rows, static_cast<const T*>(scale), stride, sum};
  const int threads = threads_for(8 * double(rows * p.carry_end), most);
  sum_carry(c, threads);
  unpack_params(c, to.params, threads);
  unpack_rates(c, to.lr);
  if (to.hyper) __builtin_memcpy(to.hyper, sum + p.hyper_at, sizeof(T) * kHyperCount);
  unpack_moments(c, to.moments, threads);
}

}  // namespace
}  // namespace mtmlk
