// All tasks of a call. Included inside an ISA-named namespace after task_reverse.h.
//
// Tasks go to threads; where there are fewer tasks than threads, the threads share each task's chunks. Sums over tasks
// run in task order within groups of kGroup tasks, and over the groups in order, so the bits do not depend on threads.

constexpr int64_t kGroup = 4;

template <class T>
struct Layout {
  Shared<T> shared;
  T* base;    // full + full_t
  T* rates;   // lr_size
  T* groups;  // [groups, carry_cols] where the carry is summed
  Runner<T>* runners;
  int64_t teams;  // tasks worked on at once
};

template <class T>
Layout<T> lay_out(Carver& c, const Plan& p, int64_t tasks, int threads, bool carry) {
  Layout<T> l = {};
  l.teams = tasks >= threads ? threads : 1;
  l.shared.workers = tasks >= threads ? 1 : threads;
  l.base = c.take<T>(p.full_size + p.full_t_size);
  l.rates = c.take<T>(p.lr_size);
  T* ones = c.take<T>(p.n_params);
  l.shared.base = c.take<ParamPtr<T>>(p.n_params);
  l.groups = carry && !p.carry_per_task ? c.take<T>((tasks + kGroup - 1) / kGroup * p.carry_cols) : nullptr;
  l.runners = c.take<Runner<T>>(l.teams);
  for (int64_t i = 0; i < l.teams; ++i) {
    Runner<T> runner;
    runner.carve(c, p, l.shared.workers);
    if (c.base) l.runners[i] = runner;
  }
  if (c.base)
    for (int64_t i = 0; i < p.n_params; ++i) ones[i] = T(1);
  l.shared.ones = ones, l.shared.rates = l.rates, l.shared.plan = &p;
  return l;
}

template <class T>
int64_t workspace_bytes(const Plan& p, int64_t tasks, int threads, bool carry) {
  Carver c = {nullptr, 0};
  lay_out<T>(c, p, tasks, threads, carry);
  return c.used;
}

// Packs theta_0 and the rates once for all tasks.
template <class T>
void pack_shared(const Plan& p, const MtmlkCall& call, Layout<T>& l) {
#pragma omp parallel for num_threads(call.threads) schedule(dynamic, 1) if (call.threads > 1 && p.full_size > 32768)
  for (int64_t i = 0; i < p.n_params; ++i) {
    const ParamPlan& param = p.params[i];
    T* value = l.base + param.full;
    T* transposed = l.base + p.full_size + param.full_t;
    pack_param<T>(param, static_cast<const T*>(call.params[i]), value);
    if (param.size_t_) transpose_packed<T>(value, param.cols, param.rows, transposed);
    l.shared.base[i] = {value, transposed};
  }
  for (int64_t i = 0; i < p.n_lr; ++i) {
    const LrPlan& lr = p.lrs[i];
    const T* src = static_cast<const T*>(call.lr[i]);
    for (int64_t k = 0; k < lr.steps; ++k) {
      T* dst = l.rates + lr.packed + k * lr.size;
      if (lr.elements)
        pack_param<T>(p.params[lr.param], src + k * p.params[lr.param].rows * p.params[lr.param].cols, dst);
      else
        dst[0] = src[k];
    }
  }
}

template <class T>
void run_group(const Plan& p, const MtmlkCall& call, Layout<T>& l, Runner<T>& r, int64_t group, int64_t size) {
  T* own = r.lambda;
  for (int64_t t = group * size; t < (group + 1) * size && t < call.tasks; ++t) {
    r.task = t;
    T* row = own;
    if (call.carry && p.carry_per_task) row = static_cast<T*>(call.carry) + t * p.carry_cols;
    const bool first = t == group * size;
    T* sum = l.groups ? l.groups + group * p.carry_cols : nullptr;
    if (sum && first) row = sum;
    r.run(row);
    if (sum && !first) affine<T>(row, p.carry_cols, T(1), T(0), true, sum);
  }
  r.lambda = own;
}

template <class T>
void sum_groups(const Plan& p, const MtmlkCall& call, const T* groups, int64_t n) {
  constexpr int64_t kPart = 4096;
  T* out = static_cast<T*>(call.carry);
#pragma omp parallel for num_threads(call.threads) schedule(static) if (call.threads > 1)
  for (int64_t start = 0; start < p.carry_cols; start += kPart) {
    const int64_t end = start + kPart < p.carry_cols ? start + kPart : p.carry_cols;
    for (int64_t i = start; i < end; i += Simd<T>::kLanes) {
      VecOf<T> sum = load<T>(groups + i);
      for (int64_t g = 1; g < n; ++g) sum += load<T>(groups + g * p.carry_cols + i);
      store<T>(out + i, sum);
    }
  }
}

template <class T>
void run_inner_loop(const Plan& p, const MtmlkCall& call, void* workspace) {
  Carver c = {static_cast<char*>(workspace), 0};
  Layout<T> l = lay_out<T>(c, p, call.tasks, call.threads, call.carry != nullptr);
  l.shared.call = &call;
  pack_shared(p, call, l);
  for (int64_t i = 0; i < l.teams; ++i) {
    l.runners[i].plan = &p, l.runners[i].call = &call, l.runners[i].shared = &l.shared;
  }
  const int64_t size = p.carry_per_task ? 1 : kGroup, groups = (call.tasks + size - 1) / size;
  if (l.teams == 1) {
    for (int64_t g = 0; g < groups; ++g) run_group(p, call, l, l.runners[0], g, size);
  } else {
#pragma omp parallel for num_threads(int(l.teams)) schedule(dynamic, 1)
    for (int64_t g = 0; g < groups; ++g) run_group(p, call, l, l.runners[omp_get_thread_num()], g, size);
  }
  if (l.groups) sum_groups(p, call, l.groups, groups);
}

// grads[p] = sum_t scale_t carry_t, unpacked.
template <class T>
void carry_to_grads(const Plan& p, const void* carry, int64_t rows, const void* scale, int64_t stride,
                    void* const* grads, void* const* lr_grads, int threads) {
  const T* source = static_cast<const T*>(carry);
  const T* scales = static_cast<const T*>(scale);
  const auto sum = [&](int64_t start, int64_t size, T* packed) {
    for (int64_t i = 0; i < size; i += Simd<T>::kLanes) {
      VecOf<T> total = scales[0] * load<T>(source + start + i);
      for (int64_t t = 1; t < rows; ++t)
        total = multiply_add<T>(splat<T>(scales[t * stride]), load<T>(source + t * p.carry_cols + start + i), total);
      store<T>(packed + i, total);
    }
  };
  T* scratch = static_cast<T*>(grads[p.n_params]);  // [carry_cols], from the caller
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1 && rows * p.carry_cols > 65536)
  for (int64_t i = 0; i < p.n_params; ++i) {
    if (!grads[i]) continue;
    sum(p.params[i].full, p.params[i].size, scratch + p.params[i].full);
    unpack_param<T>(p.params[i], scratch + p.params[i].full, static_cast<T*>(grads[i]));
  }
  for (int64_t i = 0; lr_grads && i < p.n_lr; ++i) {
    if (!lr_grads[i]) continue;
    const LrPlan& lr = p.lrs[i];
    T* packed = scratch + lr.carry;
    sum(lr.carry, round_up(lr.steps * lr.size, Simd<T>::kLanes), packed);
    T* out = static_cast<T*>(lr_grads[i]);
    for (int64_t k = 0; k < lr.steps; ++k) {
      if (lr.elements)
        unpack_param<T>(p.params[lr.param], packed + k * lr.size,
                        out + k * p.params[lr.param].rows * p.params[lr.param].cols);
      else
        out[k] = packed[k];
    }
  }
}
