// From a task's gradients in the small space to those of the features and the weight. Included after head_reverse.h.
//
// With F = [F_q; F_s] and B = [F_q; F_s; W], all that the backward pass has to read of a task:
//   dF_s = [dH^T  dG + dG^T  dZ_s] B        dF_q = [dH  dZ_q] [F_s; W]        dW = sum_t [dZ_q^T  dZ_s^T] F
// The three small matrices are a task's carry, then db [C] and the rates' gradients [groups, K, C].
//
// Threads share the columns: each goes through all tasks in order, so dW is summed in task order whatever their number,
// with no copy of it for each task.

inline int64_t head_matrix_size(const MtmlkHeadCall& c) {
  const int64_t n = c.support + c.query;
  return c.support * (n + c.classes) + c.query * (c.support + c.classes) + c.classes * n;
}

inline int64_t head_carry_size(const MtmlkHeadCall& c) {
  return head_matrix_size(c) + c.classes + c.rate_groups * c.steps * c.classes;
}

template <class T>
void head_carry(const HeadTask<T>& t, T* carry) {
  for (int64_t s = 0; s < t.S; ++s) {
    for (int64_t q = 0; q < t.Q; ++q) *carry++ = t.dcross[q * t.ls + s];
    for (int64_t i = 0; i < t.S; ++i) *carry++ = t.dgram[s * t.ls + i] + t.dgram[i * t.ls + s];
    for (int64_t c = 0; c < t.C; ++c) *carry++ = t.dzs[c * t.ls + s];
  }
  for (int64_t q = 0; q < t.Q; ++q) {
    for (int64_t s = 0; s < t.S; ++s) *carry++ = t.dcross[q * t.ls + s];
    for (int64_t c = 0; c < t.C; ++c) *carry++ = t.dzq[c * t.lq + q];
  }
  for (int64_t c = 0; c < t.C; ++c) {
    for (int64_t q = 0; q < t.Q; ++q) *carry++ = t.dzq[c * t.lq + q];
    for (int64_t s = 0; s < t.S; ++s) *carry++ = t.dzs[c * t.ls + s];
  }
  for (int64_t c = 0; c < t.C; ++c) *carry++ = t.dbias[c];
  for (int64_t i = 0; i < t.groups * t.K * t.C; ++i) *carry++ = t.drate[i];
}

// One thread's share of the columns.
template <class T>
struct HeadChain {
  const MtmlkHeadCall* call;
  int64_t begin, end;  // columns
  T *small, *rows;     // a task's scaled matrices; B's columns of one panel [S + Q + C, width]
  T *out, *sum;        // results of one panel before they are cut to size; dW [C, end - begin]

  void carve(Carver& c, const MtmlkHeadCall& given, int64_t from, int64_t to) {
    const int64_t width = kPanelVecs * Simd<T>::kLanes, n = given.support + given.query + given.classes;
    call = &given, begin = from, end = to;
    small = c.take<T>(head_matrix_size(given));
    rows = c.take<T>(n * width), out = c.take<T>(n * width);
    sum = c.take<T>(given.classes * round_up(to - from, width));
  }

  void fill_rows(int64_t task, int64_t col, int64_t width) const;
  void product(int64_t m, const T* a, int64_t k, const T* b, int64_t vecs, T* to, int64_t col, const T* from,
               int64_t ahead) const;
  void run();
};

// B's columns of one panel.
template <class T>
void HeadChain<T>::fill_rows(int64_t task, int64_t col, int64_t width) const {
  const int64_t S = call->support, Q = call->query, D = call->features;
  const T* sources[3] = {static_cast<const T*>(call->query_x) + task * Q * D,
                         static_cast<const T*>(call->support_x) + task * S * D, static_cast<const T*>(call->weight)};
  const int64_t counts[3] = {Q, S, call->classes};
  T* dst = rows;
  for (int i = 0; i < 3; ++i)
    for (int64_t r = 0; r < counts[i]; ++r, dst += width)
      for (int64_t j = 0; j < width; j += Simd<T>::kLanes) {
        const int64_t left = D - col - j;
        store<T>(dst + j, left > 0 ? load_some<T>(sources[i] + r * D + col + j, left) : VecOf<T>{});
      }
}

// Columns col ... of to [m, D] = a [m, k] b [k, width]; straight into place where whole vectors fit there. Meanwhile
// the same rows of `from` and `to` are fetched `ahead` elements on, where the next panel is: pieces of 256 bytes are
// too short for the processor to see a stream in them (7.7 ms of anil_head's chain without, 5.6 with all in cache).
template <class T>
void HeadChain<T>::product(int64_t m, const T* a, int64_t k, const T* b, int64_t vecs, T* to, int64_t col,
                           const T* from, int64_t ahead) const {
  constexpr int64_t kLanes = Simd<T>::kLanes, kLine = 64 / int64_t(sizeof(T));
  const int64_t D = call->features, width = vecs * kLanes, most = tile_rows(int(vecs)), tiles = (m + most - 1) / most;
  const bool fits = D % kLanes == 0 && reinterpret_cast<uintptr_t>(to) % kVecBytes == 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = m * i / tiles, last = m * (i + 1) / tiles;
    for (int64_t r = first; ahead && r < last; ++r)
      for (int64_t j = col + ahead; j < col + ahead + width; j += kLine)
        __builtin_prefetch(from + r * D + j, 0, 2), __builtin_prefetch(to + r * D + j, 1);
    T* c = fits ? to + first * D + col : out + first * width;
    Gemm<T> g = {c, fits ? D : width, nullptr, 0, T(1), nullptr, 0, {a + first * k, k, b, width, k}, {}};
    panel_any<T, false>(int(vecs), last - first, g);
  }
  for (int64_t r = 0; !fits && r < m; ++r)
    for (int64_t j = 0; j < width && col + j < D; j += kLanes)
      __builtin_memcpy(to + r * D + col + j, out + r * width + j,
                       sizeof(T) * size_t(D - col - j < kLanes ? D - col - j : kLanes));
}

template <class T>
void HeadChain<T>::run() {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const int64_t S = call->support, Q = call->query, C = call->classes, D = call->features, N = S + Q;
  const int64_t size = head_matrix_size(*call), carry_size = head_carry_size(*call);
  const int64_t ld = round_up(end - begin, kPanelVecs * kLanes);
  const T* scales = static_cast<const T*>(call->grad_loss);
  T *to_support = static_cast<T*>(call->grad_support_x), *to_query = static_cast<T*>(call->grad_query_x);
  T* to_weight = static_cast<T*>(call->grad_weight);
  const T *from_support = static_cast<const T*>(call->support_x), *from_query = static_cast<const T*>(call->query_x);
  for (int64_t t = 0; t < call->tasks; ++t) {
    const T* carry = static_cast<const T*>(call->carry) + t * carry_size;
    for (int64_t i = 0; scales && i < size; ++i) small[i] = scales[t] * carry[i];
    const T* ms = scales ? small : carry;
    const T *mq = ms + S * (N + C), *mw = mq + Q * (S + C);
    for (int64_t col = begin; col < end;) {
      const int64_t vecs = panel_vecs((round_up(end - col, kLanes)) / kLanes), width = vecs * kLanes;
      fill_rows(t, col, width);
      const bool last = col + width >= end, done = last && t + 1 == call->tasks;
      const auto ahead = [&](int64_t n) { return done ? 0 : last ? n * D + begin - col : width; };
      if (to_support)
        product(S, ms, N + C, rows, vecs, to_support + t * S * D, col, from_support + t * S * D, ahead(S));
      if (to_query)
        product(Q, mq, S + C, rows + Q * width, vecs, to_query + t * Q * D, col, from_query + t * Q * D, ahead(Q));
      T* into = sum + (col - begin);
      Gemm<T> g = {into, ld, t ? into : nullptr, ld, T(1), nullptr, 0, {mw, N, rows, width, N}, {}};
      if (to_weight) panel_any<T, false>(int(vecs), C, g);
      col += width;
    }
  }
  for (int64_t c = 0; to_weight && c < C; ++c)
    for (int64_t d = begin; d < end; ++d) to_weight[c * D + d] = sum[c * ld + d - begin];
}
