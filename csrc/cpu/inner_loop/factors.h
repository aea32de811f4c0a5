// The passes of a task as factors of its weights in low-rank form, see layers/low_rank.h.
#pragma once

#include <stdint.h>

#include "mtml/abi.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"
#include "layers/low_rank.h"

namespace mtmlk {
namespace {

// Which of the support sets, one a task or one a step of a task, step k reads.
inline int64_t set_of_step(const Plan& p, int64_t task, int64_t k) {
  return p.support_sets == 1 ? task : task * p.support_sets + k;
}

// The planes of one pass of a task: of the support set at step k, or of the query set where k is the number of steps.
template <class T>
Block<T> pass_of(const Plan& p, const MtmlkCall& call, T* memory, int64_t task, int64_t k, const T** inputs) {
  const bool query = k == p.steps;
  Block<T> b = {};
  b.plan = &p, b.pass = k, b.samples = b.stride = (query ? p.query : p.support).samples;
  T* at = memory + (query ? p.query_at : k * p.state_size + p.state_blocks) + p.out_rows * p.out_ld * b.stride;
  for (int plane = 0; plane < kPlanes; ++plane) {
    b.planes[plane] = at;
    at += p.plane_size[plane] * b.stride;
  }
  const void* const* x = query ? call.query_x : call.support_x;
  const int64_t set = query ? task : set_of_step(p, task, k);
  for (int64_t i = 0; x && i < p.n_inputs; ++i) inputs[i] = input_at<T>(p.inputs[i], x[i], set * b.samples);
  b.inputs = inputs;
  return b;
}

// Calls body(factor) for the factors of lambda_k: the query set's, then those of the steps K - 1 ... k.
template <class T, class Body>
void each_factor(const Plan& p, const MtmlkCall& call, const Block<T>* passes, int64_t k, const T* by, Body body) {
  if (call.query_x) body(Factor<T>{passes + p.steps, kPrimal, kDelta, by});
  for (int64_t j = p.steps - 1; j >= k; --j) {
    if (p.first_order && !call.grad_support_losses) continue;
    body(Factor<T>{passes + j, kPrimal, kDeltaTangent, by});
    if (!p.first_order) body(Factor<T>{passes + j, kTangent, kDelta, by});
  }
}

}  // namespace
}  // namespace mtmlk
