// One task of a linear head's inner loop, in the Gram matrix of its support features. Included inside an ISA-named
// namespace after head_loss.h. Classes are rows, samples are lanes; a task's weight never appears.
//
// Forward, with A = 0, u = v = 1 at first, m = decay + proximal:
//   z_k = u_k Z_s + v_k b - A_k G - B_k 1 1^T        G = F_s F_s^T [S, S], Z = W F^T [C, N]
//   R_k = w (p(z_k) - y);  A_{k+1} = (1 - alpha_k m) A_k + alpha_k R_k;  u_{k+1} = (1 - alpha_k m) u_k + alpha_k
//   proximal B, v with beta_k;   logits^T = u_K Z_q + v_K b - A_K H - B_K 1 1^T    H = F_s F_q^T [S, Q]
// Where the weight and the bias share their rates, B = A and u = v: 1 1^T is added to G and H, b to Z, and B is gone.
// Without a bias nothing is added.
// Backward, dq the cotangent of the logits, dA, dB the ones of A_K, B_K from outside:
//   dA -= dq H^T;  dB -= dq 1 1^T;  dZ_q = u_K dq;  dH = -A_K^T dq
//   for k = K-1 .. 0:  x = alpha_k dA + beta_k dB;  dz = curvature(p_k) x + s_k R_k
//     dalpha_k = sum_s dA (R_k - m A_k) + du (proximal - m u_k), and dbeta_k
//     dA <- (1 - alpha_k m) dA - dz G;  dB <- (1 - beta_k m) dB - dz 1 1^T;  dZ_s += u_k dz;  dG -= A_k^T dz
//     du <- (1 - alpha_k m) du + sum_s dz Z_s;  dv <- (1 - beta_k m) dv + b sum_s dz;  db += v_k sum_s dz

// What all tasks share.
template <class T>
struct HeadTables {
  T *rate, *keep;  // [groups, K, C]: alpha and 1 - alpha m
  T* left;         // [groups, K + 1, C]: u and v
};

template <class T>
struct HeadTask {
  const MtmlkHeadCall* call;
  const HeadTables<T>* tables;
  int64_t S, Q, C, D, K, groups, ls, lq, wide;  // wide: A and B side by side
  T *packed, *product;                          // [D, S + C] panels; [S + Q, lp] = F [F_s; W]^T
  T *gram, *cross, *cross_t, *ones;             // G [S, ls], H^T [Q, ls], H [S, lq], [ls or lq]
  T *zs, *zq, *base;                            // [C, ls], [C, lq], room for one of them
  T *stack, *probs, *query;                     // A_k [K + 1, C, wide]; p_k, then dz_k [K, C, ls]; logits, then dq
  T *da, *x, *dzs, *dzq, *dgram, *dcross;       // [C, wide], [C, ls], [C, ls], [C, lq], [S, ls], [Q, ls]
  T *du, *dbias, *drate;                        // [groups, C], [C], [groups, K, C]
  HeadLoss<T> support_loss, query_loss;

  void carve(Carver& c, const MtmlkHeadCall& given);
  void measure(int64_t task);
  void adapt(int64_t task);
  void judge(int64_t task);
  void reverse(int64_t task);
  void reverse_query(int64_t task);
  void reverse_step(int64_t task, int64_t k);

  const T* rate(int64_t g, int64_t k) const { return tables->rate + (g * K + k) * C; }
  const T* keep(int64_t g, int64_t k) const { return tables->keep + (g * K + k) * C; }
  const T* left(int64_t g, int64_t k) const { return tables->left + (g * (K + 1) + k) * C; }
  bool decays() const { return call->decay != 0; }  // else u = v = 1
};

template <class T>
void HeadTask<T>::carve(Carver& c, const MtmlkHeadCall& given) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  S = given.support, Q = given.query, C = given.classes, D = given.features, K = given.steps;
  groups = given.rate_groups, ls = round_up(S, kLanes), lq = round_up(Q, kLanes), wide = groups * ls;
  const int64_t lp = round_up(S + C, kLanes);
  packed = c.take<T>(D * lp), product = c.take<T>((S + Q) * lp);
  gram = c.take<T>(S * ls), cross = c.take<T>(Q * ls), cross_t = c.take<T>(S * lq);
  ones = c.take<T>(ls > lq ? ls : lq);
  zs = c.take<T>(C * ls), zq = c.take<T>(C * lq), base = c.take<T>(C * (ls > lq ? ls : lq));
  stack = c.take<T>((K + 1) * C * wide), probs = c.take<T>(K * C * ls), query = c.take<T>(C * lq);
  da = c.take<T>(C * wide), x = c.take<T>(C * ls), dzs = c.take<T>(C * ls), dzq = c.take<T>(C * lq);
  dgram = c.take<T>(S * ls), dcross = c.take<T>(Q * ls);
  du = c.take<T>(groups * C), dbias = c.take<T>(C), drate = c.take<T>(groups * K * C);
  support_loss = {given.support_loss.kind, C, ls, c.take<T>(C * ls), c.take<T>(ls)};
  query_loss = {given.query_loss.kind, C, lq, c.take<T>(C * lq), c.take<T>(lq)};
}

// [F_s; W]^T as panels: kLanes rows at a time through a block, so that rows may begin anywhere.
template <class T>
void pack_features(const T* features, int64_t samples, const T* weight, int64_t classes, int64_t D, T* packed) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  T from[kLanes * kLanes] __attribute__((aligned(kVecBytes))), to[kLanes * kLanes] __attribute__((aligned(kVecBytes)));
  each_panel<T>(D, samples + classes, [&](int64_t start, int64_t col, int64_t width) {
    for (int64_t d = 0; d < D; d += kLanes)
      for (int64_t o = 0; o < width; o += kLanes) {
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t row = col + o + i, at = row - samples;
          const T* src = at < 0 ? features + row * D : at < classes ? weight + at * D : nullptr;
          store<T>(from + i * kLanes, src ? load_some<T>(src + d, D - d) : VecOf<T>{});
        }
        T* dst = packed + start + d * width + o;
        if (D - d >= kLanes) {
          transpose_block<T>(from, kLanes, dst, width);
          continue;
        }
        transpose_block<T>(from, kLanes, to, kLanes);
        for (int64_t i = 0; i < D - d; ++i) store<T>(dst + i * width, load<T>(to + i * kLanes));
      }
  });
}

// G, H and Z of a task: one product of all features with those of the support set and the weight.
template <class T>
void HeadTask<T>::measure(int64_t task) {
  const T* fs = static_cast<const T*>(call->support_x) + task * S * D;
  const T* fq = static_cast<const T*>(call->query_x) + task * Q * D;
  const T* b = static_cast<const T*>(call->bias);
  const int64_t lp = round_up(S + C, Simd<T>::kLanes);
  pack_features<T>(fs, S, static_cast<const T*>(call->weight), C, D, packed);
  const T* parts[2] = {fs, fq};
  const int64_t rows[2] = {S, Q};
  for (int i = 0; i < 2; ++i) {
    Gemm<T> g = {product + (i ? S * lp : 0), lp, nullptr, 0, T(1), nullptr, 0, {parts[i], D, packed, 0, D}, {}};
    multiply_packed<T>(rows[i], lp, g);
  }
  const T one = T(groups == 1 && b);
  fill_zero<T>(gram, S * ls), fill_zero<T>(cross, Q * ls), fill_zero<T>(cross_t, S * lq);
  fill_zero<T>(zs, C * ls), fill_zero<T>(zq, C * lq);
  for (int64_t i = 0; i < S; ++i) {
    const T* row = product + i * lp;
    for (int64_t s = 0; s < S; ++s) gram[i * ls + s] = row[s] + one;
    for (int64_t c = 0; c < C; ++c) zs[c * ls + i] = row[S + c] + (one == 0 ? T(0) : b[c]);
  }
  for (int64_t i = 0; i < Q; ++i) {
    const T* row = product + (S + i) * lp;
    for (int64_t s = 0; s < S; ++s) cross[i * ls + s] = cross_t[s * lq + i] = row[s] + one;
    for (int64_t c = 0; c < C; ++c) zq[c * lq + i] = row[S + c] + (one == 0 ? T(0) : b[c]);
  }
  for (int64_t i = 0; i < (ls > lq ? ls : lq); ++i) ones[i] = T(1);
}

// to = u Z + v b, [C, ld]
template <class T>
void head_base(const HeadTask<T>& t, int64_t k, const T* z, int64_t ld, T* to) {
  const T *u = t.left(0, k), *v = t.left(t.groups - 1, k), *b = static_cast<const T*>(t.call->bias);
  for (int64_t c = 0; c < t.C; ++c) {
    const VecOf<T> shift = splat<T>(t.groups == 1 ? T(0) : v[c] * b[c]);
    for (int64_t j = c * ld; j < (c + 1) * ld; j += Simd<T>::kLanes)
      store<T>(to + j, multiply_add<T>(splat<T>(u[c]), load<T>(z + j), shift));
  }
}

// z = base - A right - B 1 1^T, [C, ld]; A_0 = 0 is not multiplied.
template <class T>
void head_logits(const HeadTask<T>& t, int64_t k, const T* base, const T* right, int64_t ld, T* z) {
  const T* a = t.stack + k * t.C * t.wide;
  const int64_t S = k ? t.S : 0;
  const Product<T> shift = {a + t.ls, t.wide, t.ones, 0, t.groups == 2 ? S : 0};
  Gemm<T> g = {z, ld, base, ld, T(-1), nullptr, 0, {a, t.wide, right, ld, S}, shift};
  multiply_rows<T, false>(t.C, ld, g);
}

template <class T>
void HeadTask<T>::adapt(int64_t task) {
  T* losses = static_cast<T*>(call->support_losses);
  fill_zero<T>(stack, C * wide);
  head_base<T>(*this, 0, zs, ls, base);
  for (int64_t k = 0; k < K; ++k) {
    if (k && decays()) head_base<T>(*this, k, zs, ls, base);
    T *p = probs + k * C * ls, *a = stack + k * C * wide, *next = a + C * wide;
    head_logits<T>(*this, k, base, gram, ls, p);
    const VecOf<T> loss = head_predict<T>(support_loss, p);
    if (losses) losses[k * call->tasks + task] = sum_lanes<T>(loss);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = 0; c < C; ++c) {
        const VecOf<T> alpha = splat<T>(rate(g, k)[c]), kept = splat<T>(keep(g, k)[c]);
        for (int64_t j = 0; j < ls; j += Simd<T>::kLanes) {
          const VecOf<T> r =
              load<T>(support_loss.w + j) * (load<T>(p + c * ls + j) - load<T>(support_loss.y + c * ls + j));
          const int64_t at = c * wide + g * ls + j;
          store<T>(next + at, multiply_add<T>(alpha, r, kept * load<T>(a + at)));
        }
      }
  }
}

// Logits, coefficients and loss. The logits turn into predictions where there is a loss.
template <class T>
void HeadTask<T>::judge(int64_t task) {
  T *loss = static_cast<T*>(call->loss), *logits = static_cast<T*>(call->logits);
  T* coefficients = static_cast<T*>(call->coefficients);
  if (Q) {
    head_base<T>(*this, K, zq, lq, base);
    head_logits<T>(*this, K, base, cross_t, lq, query);
  }
  for (int64_t q = 0; logits && q < Q; ++q)
    for (int64_t c = 0; c < C; ++c) logits[(task * Q + q) * C + c] = query[c * lq + q];
  const T* a = stack + K * C * wide;
  for (int64_t g = 0; coefficients && g < groups; ++g)
    for (int64_t c = 0; c < C; ++c)
      for (int64_t s = 0; s < S; ++s) coefficients[((task * groups + g) * C + c) * S + s] = a[c * wide + g * ls + s];
  if (loss) loss[task] = T(0);  // of no samples
  if (!call->query_y) return;
  const VecOf<T> value = head_predict<T>(query_loss, query);
  if (loss) loss[task] = sum_lanes<T>(value);
}
