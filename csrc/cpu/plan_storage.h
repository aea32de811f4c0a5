// A plan with the memory behind its arrays. Only the planning code sees it.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "make_taps.h"
#include "plan.h"

namespace mtmlk {

struct PlanStorage : Plan {
  std::vector<ValuePlan> value_store;
  std::vector<ParamPlan> param_store;
  std::vector<LrPlan> lr_store;
  std::vector<InputPlan> input_store;
  std::vector<std::unique_ptr<std::array<int64_t, kWindowConsts>>> windows;
  std::vector<std::unique_ptr<NormPlan>> norms;
  std::vector<std::unique_ptr<ConvPlan>> convs;
  std::vector<std::unique_ptr<TapStorage>> taps;
};

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t divide_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
inline int64_t element_bytes(const Plan& plan) { return plan.dtype == MTMLK_F32 ? 4 : 8; }

int count_uses(const Plan& plan, int32_t value);

// plan_images.cpp, in the order of their calls.
bool check_image_node(const PlanStorage& plan, const ValuePlan& v);
void mark_chains(PlanStorage& plan);  // after the dependences
bool is_remade(const Plan& plan, const ValuePlan& v);
void place_norm(Plan& plan, ValuePlan& v);  // while values get their places
void place_images(PlanStorage& plan);       // after that
void place_scratch(Plan& plan);             // once the samples of support and query are known

}  // namespace mtmlk
