// The four functions of every node, over a block of samples. Included inside an ISA-named namespace.
//
//   forward            value                               kPrimal
//   backward           gradient with respect to it         kDelta
//   tangent            derivative along a direction V      kTangent         (at = f' at step theta + eps V)
//   tangent backward   the same derivative of the gradient kDeltaTangent
// For a linear layer z = a W + b:
//   backward           da = dz W^T            dW = a^T dz             db = sum dz
//   tangent            zt = at W + a V + vb
//   tangent backward   dat = dzt W^T + dz V^T dWt = a^T dzt + at^T dz dbt = sum dzt
// Nodes that are linear in their operands send dz and dzt back alike, so one function serves both planes.

template <class T>
struct ParamPtr {
  const T* value;       // packed
  const T* transposed;  // packed transposed copy, where the plan has one
};

// Where the parameter gradients of a pass go: dst = (first block ? init : dst) + beta * gradient. All are [n_params];
// dst nullptr: not wanted; init nullptr: zero.
template <class T>
struct Sink {
  T* const* dst;
  const T* const* init;
  const T* beta;
  bool first;
};

template <class T>
struct Block {
  const Plan* plan;
  int64_t samples;
  const T* const* inputs;  // [n_inputs] at the block's first sample, [samples, size]
  T* planes[kPlanes];      // of batched values
  T* fixed[kPlanes];       // of unbatched values
  int64_t stride;          // samples that the planes have room for
  const ParamPtr<T>* params;
  const ParamPtr<T>* direction;  // V, for the tangent passes
  bool tangent;                  // false: V = 0 (first order)
  bool remake;                   // outputs of `remade` convolutions have no plane: they are made where they are needed
  int workers;                   // threads that may share the block's nodes
  T* scratch;                    // [plan->scratch_size], of the block
  T* own;                        // [workers, plan->worker_scratch_size]
};

// body(i, worker) for i < n. What i covers never depends on how many workers there are.
template <class T, class Body>
void share(const Block<T>& b, int64_t n, Body body) {
  if (b.workers == 1 || n == 1) {
    for (int64_t i = 0; i < n; ++i) body(i, 0);
    return;
  }
#pragma omp parallel for num_threads(b.workers) schedule(static)
  for (int64_t i = 0; i < n; ++i) body(i, omp_get_thread_num());
}

template <class T>
MTMLK_INLINE T* plane_of(const Block<T>& b, int32_t value, Plane plane) {
  const ValuePlan& v = b.plan->values[value];
  if (v.direct_input && plane == kPrimal) return const_cast<T*>(b.inputs[v.kind]);
  return v.batched ? b.planes[plane] + v.offset[plane] * b.stride : b.fixed[plane] + v.offset[plane];
}

template <class T>
MTMLK_INLINE int64_t rows_of(const Block<T>& b, const ValuePlan& v) {
  return v.batched ? v.rows * b.samples : v.rows;
}

template <class T>
MTMLK_INLINE bool has_tangent(const Block<T>& b, int32_t value) {
  return b.tangent && b.plan->values[value].tan;
}

template <class T>
void fill_zero(T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += Simd<T>::kLanes) store<T>(p + i, VecOf<T>{});
}

// dst += beta * column sums of src [rows, ld], or dst = init + ...
template <class T>
void sum_rows(const T* src, int64_t rows, int64_t ld, const T* init, T beta, T* dst) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t col = 0; col < ld; col += kLanes) {
    VecOf<T> even = {}, odd = {};
    int64_t r = 0;
    for (; r + 1 < rows; r += 2) {
      even += load<T>(src + r * ld + col);
      odd += load<T>(src + (r + 1) * ld + col);
    }
    if (r < rows) even += load<T>(src + r * ld + col);
    const VecOf<T> start = init ? load<T>(init + col) : VecOf<T>{};
    store<T>(dst + col, multiply_add<T>(splat<T>(beta), even + odd, start));
  }
}

template <class T>
MTMLK_INLINE const T* sink_init(const Sink<T>& sink, int32_t param, bool add) {
  return add || !sink.first ? sink.dst[param] : sink.init[param];
}

// ---- linear ----

// z = bias + A1 W1 + A2 W2 (the products in g), for a packed or a narrow weight.
template <class T>
void apply_weight(const ParamPlan& w, int64_t rows, T* z, int64_t ld, const T* bias, Gemm<T>& g) {
  g.c = z, g.ldc = ld, g.d = bias, g.ldd = 0, g.beta = T(1);
  if (!w.narrow) return multiply_packed<T>(rows, ld, g);
  const int64_t padded = round_up(w.cols, Simd<T>::kLanes);
  g.p1.ldb = g.p2.ldb = padded;
  g.p1.k = g.p1.k ? padded : 0;
  g.p2.k = g.p2.k ? padded : 0;
  multiply_narrow<T>(rows, w.rows, z, ld, bias, g);
}

template <class T>
void linear_forward(const Block<T>& b, const ValuePlan& v, T* z) {
  const ParamPlan& w = b.plan->params[v.weight];
  Gemm<T> g = {};
  g.p1.a = plane_of(b, v.a, kPrimal), g.p1.lda = b.plan->values[v.a].ld_primal;
  g.p1.b = b.params[v.weight].value, g.p1.k = w.cols;
  if (v.gate_output) g.gate = z, g.ldgate = v.ld;
  apply_weight<T>(w, rows_of(b, v), z, v.ld, v.bias >= 0 ? b.params[v.bias].value : nullptr, g);
}

template <class T>
void linear_tangent(const Block<T>& b, const ValuePlan& v, T* zt) {
  const ValuePlan& a = b.plan->values[v.a];
  const ParamPlan& w = b.plan->params[v.weight];
  const bool bias_moves = v.bias >= 0 && b.plan->params[v.bias].adapted, input_moves = has_tangent(b, v.a);
  Gemm<T> g = {};
  if (input_moves) {
    g.p1.a = plane_of(b, v.a, kTangent), g.p1.lda = a.ld, g.p1.b = b.params[v.weight].value, g.p1.k = w.cols;
  }
  if (w.adapted) {
    Product<T>& p = input_moves ? g.p2 : g.p1;
    p.a = plane_of(b, v.a, kPrimal), p.lda = a.ld_primal, p.b = b.direction[v.weight].value, p.k = w.cols;
  }
  if (v.gate_output) g.gate = plane_of(b, int32_t(&v - b.plan->values), kPrimal), g.ldgate = v.ld;
  apply_weight<T>(w, rows_of(b, v), zt, v.ld, bias_moves ? b.direction[v.bias].value : nullptr, g);
}

// dW = sink's start + beta (a^T dz + at^T dz2); a narrow weight is the transpose of a packed one. The products in g
// have the inputs as a and the deltas as b.
template <class T>
void weight_gradient(const ParamPlan& w, int64_t ld, const Sink<T>& sink, int32_t param, bool add, Gemm<T>& g) {
  g.c = sink.dst[param], g.d = sink_init(sink, param, add), g.beta = sink.beta[param];
  if (!w.narrow) return multiply_transposed<T>(w.cols, ld, g);
  Product<T>* products[2] = {&g.p1, &g.p2};
  for (Product<T>* p : products) {
    const T* a = p->a;
    const int64_t lda = p->lda;
    p->a = p->b, p->lda = p->ldb, p->b = a, p->ldb = lda;
  }
  T* const c = g.c;
  g.ldc = g.ldd = round_up(w.cols, Simd<T>::kLanes);
  multiply_rows<T, true>(w.rows, g.ldc, g);
  const int64_t last = g.ldc - Simd<T>::kLanes;  // a's padding need not be 0 (sigmoid(0) is not), the weight's must
  for (int64_t o = 0; o < w.rows; ++o) {
    T* end = c + o * g.ldc + last;
    store<T>(end, keep_lanes<T>(load<T>(end), w.cols - last));
  }
}

template <class T>
void input_gradient(const Block<T>& b, const ValuePlan& v, Plane plane, const T* dz, const T* primal_dz) {
  const ValuePlan& a = b.plan->values[v.a];
  const ParamPlan& w = b.plan->params[v.weight];
  const auto weight = [&](const ParamPtr<T>& p) { return w.narrow ? p.value : p.transposed; };
  Gemm<T> g = {};
  g.c = plane_of(b, v.a, plane), g.ldc = a.ld, g.d = v.add_a ? g.c : nullptr, g.ldd = a.ld, g.beta = T(1);
  g.p1.a = dz, g.p1.lda = v.ld, g.p1.b = weight(b.params[v.weight]), g.p1.ldb = a.ld, g.p1.k = w.rows;
  if (plane == kDeltaTangent && b.tangent && w.adapted) {
    g.p2.a = primal_dz, g.p2.lda = v.ld, g.p2.b = weight(b.direction[v.weight]), g.p2.ldb = a.ld, g.p2.k = w.rows;
  }
  if (v.gate_input) g.gate = plane_of(b, v.a, kPrimal), g.ldgate = a.ld;
  if (w.narrow)
    multiply_rows<T, false>(rows_of(b, v), a.ld, g);
  else
    multiply_packed<T>(rows_of(b, v), a.ld, g);
}

// `plane` is kDelta or kDeltaTangent; the latter has the second products.
template <class T>
void linear_backward(const Block<T>& b, const ValuePlan& v, Plane plane, const Sink<T>& sink, bool to_input) {
  const ValuePlan& a = b.plan->values[v.a];
  const int32_t self = int32_t(&v - b.plan->values);
  const int64_t rows = rows_of(b, v);
  const T *dz = plane_of(b, self, plane), *primal_dz = plane_of(b, self, kDelta);
  if (sink.dst[v.weight]) {
    Gemm<T> g = {};
    g.p1.a = plane_of(b, v.a, kPrimal), g.p1.lda = a.ld_primal, g.p1.b = dz, g.p1.ldb = v.ld, g.p1.k = rows;
    if (plane == kDeltaTangent && has_tangent(b, v.a)) {
      g.p2.a = plane_of(b, v.a, kTangent), g.p2.lda = a.ld, g.p2.b = primal_dz, g.p2.ldb = v.ld, g.p2.k = rows;
    }
    weight_gradient<T>(b.plan->params[v.weight], v.ld, sink, v.weight, v.add_weight, g);
  }
  if (v.bias >= 0 && sink.dst[v.bias])
    sum_rows<T>(dz, rows, v.ld, sink_init(sink, v.bias, v.add_bias), sink.beta[v.bias], sink.dst[v.bias]);
  if (to_input) input_gradient<T>(b, v, plane, dz, primal_dz);
}

// ---- activations ----

template <class T>
void act_node(const Block<T>& b, const ValuePlan& v, Plane plane) {
  const bool forward = plane == kPrimal || plane == kTangent;
  if (forward ? v.gated_before : v.gated_after) return;  // a relu that the products around it apply
  const int32_t self = int32_t(&v - b.plan->values);
  ActPlanes<T> p = {};
  p.kind = v.kind, p.mode = v.act_mode, p.c0 = T(v.c0), p.c1 = T(v.c1), p.n = rows_of(b, v) * v.ld;
  p.z = plane_of(b, v.a, kPrimal), p.a = plane_of(b, self, kPrimal);
  p.dz = plane_of(b, v.a, kDelta), p.da = plane_of(b, self, kDelta);
  p.zt = plane_of(b, v.a, kTangent), p.at = plane_of(b, self, kTangent);
  p.dzt = plane_of(b, v.a, kDeltaTangent), p.dat = plane_of(b, self, kDeltaTangent);
  p.add = v.add_a;
  act_pass_any<T>(p, plane, has_tangent(b, v.a));
}

// ---- broadcasting sums and products ----

// How an operand lies under the output's rows: row i reads its row (i % period), splatted where it has one feature.
template <class T>
struct Operand {
  T* p;
  int64_t ld, period;
  bool splat_row;
};

template <class T>
Operand<T> operand_of(const Block<T>& b, const ValuePlan& out, int32_t value, Plane plane) {
  const ValuePlan& v = b.plan->values[value];
  return {plane_of(b, value, plane), v.ld, rows_of(b, v), v.features == 1 && out.features != 1};
}

template <class T>
MTMLK_INLINE T* operand_row(const Operand<T>& o, int64_t row) {
  return o.p + (o.period == 1 ? 0 : row % o.period) * o.ld;
}

template <class T>
MTMLK_INLINE VecOf<T> read_operand(const Operand<T>& o, const T* row, int64_t col) {
  return o.splat_row ? splat<T>(row[0]) : load<T>(row + col);
}

// out = x + y, or x * y; y nullptr is the neutral element.
template <class T, bool kProduct>
void combine(const Operand<T>& x, const Operand<T>* y, T* out, int64_t rows, int64_t ld, bool add) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* left = operand_row(x, r);
    const T* right = y ? operand_row(*y, r) : nullptr;
    for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
      VecOf<T> value = read_operand<T>(x, left, c);
      if (y) value = kProduct ? value * read_operand<T>(*y, right, c) : value + read_operand<T>(*y, right, c);
      T* to = out + r * ld + c;
      store<T>(to, add ? load<T>(to) + value : value);
    }
  }
}

template <class T, bool kProduct>
void combine_nodes(const Block<T>& b, const ValuePlan& v, Plane plane_a, Plane plane_b, T* out, bool add) {
  const Operand<T> y = operand_of(b, v, v.b, plane_b);
  combine<T, kProduct>(operand_of(b, v, v.a, plane_a), &y, out, rows_of(b, v), v.ld, add);
}

// The gradient g (times factor's row, if any) of the output's rows, summed back into an operand.
template <class T>
void send_back(const T* g, int64_t rows, int64_t ld, const Operand<T>* factor, const Operand<T>& to, bool add) {
  constexpr int kLanes = Simd<T>::kLanes;
  if (!add) fill_zero<T>(to.p, to.period * to.ld);
  for (int64_t r = 0; r < rows; ++r) {
    T* dst = operand_row(to, r);
    const T* by = factor ? operand_row(*factor, r) : nullptr;
    VecOf<T> sum = {};
    for (int64_t c = 0; c < ld; c += kLanes) {
      VecOf<T> value = load<T>(g + r * ld + c);
      if (factor) value = value * read_operand<T>(*factor, by, c);
      if (to.splat_row)
        sum += value;
      else
        store<T>(dst + c, load<T>(dst + c) + value);
    }
    if (to.splat_row) dst[0] += sum_lanes<T>(sum);
  }
}

template <class T>
void add_tangent(const Block<T>& b, const ValuePlan& v, T* out) {
  bool add = false;
  const int32_t operands[2] = {v.a, v.b};
  for (const int32_t operand : operands) {
    if (!has_tangent(b, operand)) continue;
    combine<T, false>(operand_of(b, v, operand, kTangent), nullptr, out, rows_of(b, v), v.ld, add);
    add = true;
  }
}

template <class T>
void mul_tangent(const Block<T>& b, const ValuePlan& v, T* out) {
  if (has_tangent(b, v.a)) combine_nodes<T, true>(b, v, kTangent, kPrimal, out, false);
  if (has_tangent(b, v.b)) combine_nodes<T, true>(b, v, kPrimal, kTangent, out, has_tangent(b, v.a));
}

template <class T>
void pair_backward(const Block<T>& b, const ValuePlan& v, Plane plane, bool to_a, bool to_b) {
  const int32_t self = int32_t(&v - b.plan->values);
  const int64_t rows = rows_of(b, v);
  const T* g = plane_of(b, self, plane);
  const bool product = v.op == kMul;
  const auto send = [&](int32_t to, int32_t other, bool add) {
    const Operand<T> dst = operand_of(b, v, to, plane);
    const Operand<T> factor = operand_of(b, v, other, kPrimal);
    send_back<T>(g, rows, v.ld, product ? &factor : nullptr, dst, add);
    if (product && plane == kDeltaTangent && has_tangent(b, other)) {
      const Operand<T> moved = operand_of(b, v, other, kTangent);
      send_back<T>(plane_of(b, self, kDelta), rows, v.ld, &moved, dst, true);
    }
  };
  if (to_a) send(v.a, v.b, v.add_a);
  if (to_b) send(v.b, v.a, v.add_b);
}

// ---- moving elements: view, cat, expand, affine ----

// Element e of a sample (row-major over its real rows and features) in a padded plane.
MTMLK_INLINE int64_t padded_index(const ValuePlan& v, int64_t e) { return e / v.features * v.ld + e % v.features; }

template <class T>
void copy_view(const ValuePlan& from, const T* src, const ValuePlan& to, T* dst, int64_t samples, bool add) {
  const int64_t run = from.features < to.features ? from.features : to.features;
  const int64_t unit = (from.features % run == 0 && to.features % run == 0) ? run : 1;
  const int64_t size = to.rows * to.features;
  for (int64_t n = 0; n < samples; ++n, src += from.rows * from.ld, dst += to.rows * to.ld) {
    if (!add) fill_zero<T>(dst, to.rows * to.ld);
    for (int64_t e = 0; e < size; e += unit) {
      const T* s = src + padded_index(from, e);
      T* d = dst + padded_index(to, e);
      for (int64_t i = 0; i < unit; ++i) d[i] = add ? d[i] + s[i] : s[i];
    }
  }
}

template <class T>
void cat_forward(const Block<T>& b, const ValuePlan& v, Plane plane, T* out) {
  int64_t column = 0;
  fill_zero<T>(out, rows_of(b, v) * v.ld);
  const int32_t operands[2] = {v.a, v.b};
  for (const int32_t operand : operands) {
    const ValuePlan& x = b.plan->values[operand];
    if (plane == kPrimal || has_tangent(b, operand)) {
      const T* src = plane_of(b, operand, plane);
      for (int64_t r = 0; r < rows_of(b, v); ++r)
        for (int64_t f = 0; f < x.features; ++f) out[r * v.ld + column + f] = src[r * x.ld + f];
    }
    column += x.features;
  }
}

template <class T>
void cat_backward(const Block<T>& b, const ValuePlan& v, Plane plane, bool to_a, bool to_b) {
  const T* g = plane_of(b, int32_t(&v - b.plan->values), plane);
  int64_t column = 0;
  const auto send = [&](int32_t operand, bool wanted, bool add) {
    const ValuePlan& x = b.plan->values[operand];
    if (wanted) {
      T* dst = plane_of(b, operand, plane);
      if (!add) fill_zero<T>(dst, rows_of(b, x) * x.ld);
      for (int64_t r = 0; r < rows_of(b, x); ++r)
        for (int64_t f = 0; f < x.features; ++f) dst[r * x.ld + f] += g[r * v.ld + column + f];
    }
    column += x.features;
  };
  send(v.a, to_a, v.add_a);
  send(v.b, to_b, v.add_b);
}

template <class T>
void affine(const T* src, int64_t n, T scale, T shift, bool add, T* dst) {
  for (int64_t i = 0; i < n; i += Simd<T>::kLanes) {
    const VecOf<T> value = multiply_add<T>(load<T>(src + i), splat<T>(scale), splat<T>(shift));
    store<T>(dst + i, add ? load<T>(dst + i) + value : value);
  }
}

template <class T>
void read_input(const Block<T>& b, const ValuePlan& v, T* out) {
  const T* src = b.inputs[v.kind];
  for (int64_t r = 0; r < rows_of(b, v); ++r)
    for (int64_t f = 0; f < v.ld; f += Simd<T>::kLanes)
      store<T>(out + r * v.ld + f, load_some<T>(src + r * v.features + f, v.features - f));
}
