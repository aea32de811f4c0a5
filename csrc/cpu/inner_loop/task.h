// One task: K inner steps, the query loss, and the meta-gradient by forward-over-reverse.
//
//   theta_{k+1} = theta_k - alpha_k g_k,            g_k = grad of the support loss at theta_k
//   lambda_K    = w_K grad L_q(theta_K) + ext_K
//   lambda_k    = lambda_{k+1} - H_k (alpha_k lambda_{k+1}) + s_k g_k + w_k grad L_q(theta_k) + ext_k
//   dalpha_k   -= g_k lambda_{k+1}
// With another update rule, rule.h has what takes the place of alpha_k lambda_{k+1}.
// H_k v is the tangent of the gradient along v: the tangent passes below run with V = -alpha_k lambda_{k+1}, seeded
// with s_k g_k, and add straight into lambda. Inputs, targets and sample weights get theirs from the same passes.
#pragma once

#include <stdint.h>

#include "simd/layout.h"
#include "inner_loop/plan/plan.h"
#include "inner_loop/passes.h"
#include "inner_loop/reverse.h"
#include "inner_loop/rule.h"
#include "inner_loop/runner.h"

namespace mtmlk {
namespace {

// A task from theta_0 to its loss, adapted parameters and (differentiating) meta-gradient in carry_row [carry_cols].
template <class T>
void Runner<T>::run(T* carry_row) {
  const int64_t steps = plan->steps;
  for (int64_t k = 0; k < plan->support_sets; ++k) sample_weights(support(k), coef[0] + k * plan->support.samples);
  sample_weights(query(), coef[1]);
  load_start();
  load_moments();
  clear_gradients();
  for (int64_t k = 0; k <= (plan->query_steps ? steps : 0); ++k) losses[steps + k] = 0;
  for (int64_t k = 0; k < steps; ++k) {
    if (stops_at(k)) return;
    if (call->query_x && !differentiate() && step_weight(k) != 0) query_pass(k, false);
    write_adapted(k);
    inner_step(k, true);
    take_step(k);
  }
  write_adapted(steps);
  write_moments();
  if (differentiate())
    reverse(carry_row);
  else if (call->query_x)
    query_pass(steps, false);
}

// lambda_K ... lambda_0 into carry_row, and the rates' gradients.
template <class T>
void Runner<T>::reverse(T* carry_row) {
  const int64_t steps = plan->steps;
  lambda = carry_row;
  fill_zero<T>(lambda + plan->lambda_size, plan->carry_cols - plan->lambda_size);
  for (int64_t i = 0; i < plan->n_params; ++i)  // of which a pass writes one row
    if (plan->params[i].layout == kStepRows) fill_zero<T>(lambda + plan->params[i].full, plan->params[i].size);
  if (call->query_x)
    query_pass(steps, false);  // writes every parameter that is used
  else
    fill_zero<T>(lambda, plan->lambda_size);
  for (int64_t i = 0; i < plan->n_params; ++i)  // no pass writes a parameter that the output does not depend on
    if (!plan->params[i].used) fill_zero<T>(lambda + plan->params[i].full, plan->params[i].size);
  add_external(steps);
  start_cotangents();
  const T* seeds = static_cast<const T*>(call->grad_support_losses);
  for (int64_t k = steps - 1; k >= 0 && !stops_at(k); --k) {
    if (segmented() && k < steps - 1 && (k + 1) % plan->slots == 0) replay(k + 1 - plan->slots, k + 1);
    point_along(k);
    if (!plan->plain) rule_adjoint(k);
    if (plan->plain && (plan->needs & MTMLK_NEED_LR)) rate_gradients(k);
    if (plan->plain && !plan->first_order) make_direction(k);
    tangent_pass(k, seeds ? seeds[k * call->tasks + task] : T(0));
    if (call->query_x && step_weight(k) != 0) query_pass(k, true);
    add_external(k);
  }
  if (plan->needs & MTMLK_NEED_MOMENTS)
    copy_elements(moments[1], plan->n_moments * plan->own_size, lambda + plan->moments_at);
}

}  // namespace
}  // namespace mtmlk
