// A plan with the memory behind its arrays. Only the planning code sees it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <vector>

#include "mtml/abi.h"
#include "mtml/sizes.h"
#include "inner_loop/plan/make_taps.h"
#include "inner_loop/plan/plan.h"

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

constexpr int64_t kNearBytes = 24 << 10;  // of 32 KiB: the rest is for weights and results
constexpr int64_t kFarBytes = 192 << 10;  // of 1 MiB, which also holds a layer's weights and its inputs

// What the way back needs of a step's gradient is kept with it.
inline bool keeps_gradients(const Plan& plan) { return (plan.needs & MTMLK_NEED_LR) || (plan.needs && !plan.plain); }

// A row of the carry for each task up to here, else one for their sum.
constexpr int64_t kTaskCarryBytes = 64 << 10;
int64_t params_room(const Plan& plan);  // in a row of the carry, on any machine

int count_uses(const Plan& plan, int32_t value);

// check.cpp and layers.cpp: where something is wrong they say so in words and return false.
class Why {
 public:
  explicit Why(MtmlkReason* to) : to_(to) {}
  bool operator()(const char* format, ...) const __attribute__((format(printf, 2, 3)));

 private:
  MtmlkReason* to_;
};

inline bool is_count(double c, double least, double most) { return c >= least && c <= most && c == std::floor(c); }
bool check_header(const MtmlkPlanSpec& spec, const Why& why);  // before it is decoded
bool check_window(const double* consts, const Why& why);       // [kWindowConsts], before they become integers
bool check_program(const PlanStorage& plan, const Why& why);   // decoded, all indices in range
bool check_sizes(const Plan& plan, const MtmlkPlanSpec& spec, const Why& why);  // no sum or product overflows

// embedding.cpp: which inputs are ids, and where the gradients of the others lie.
void mark_ids(PlanStorage& plan);

// images.cpp, in the order of their calls.
void mark_chains(PlanStorage& plan);  // after the dependences
bool is_remade(const Plan& plan, const ValuePlan& v);
void place_norm(Plan& plan, ValuePlan& v);  // while values get their places
void place_images(PlanStorage& plan);       // after that
void place_scratch(Plan& plan);             // once the samples of support and query are known

// low_rank.cpp
void mark_low_rank(PlanStorage& plan, const MtmlkPlanSpec& spec);  // once values have their places
void place_low_state(Plan& plan);                                  // at the end of place_state

// pairs.cpp
bool runs_in_pairs(const ValuePlan& v, const ValuePlan& a);
void place_pairs(PlanStorage& plan, const ValuePlan& v, ConvPlan& conv, const AxisShape& y);
int64_t part_size(const Plan& plan, const ValuePlan& v);  // of a part's gradients: weight, bias, transformed weight
void place_pair_scratch(Plan& plan, int64_t samples);     // behind all other scratch

}  // namespace mtmlk
