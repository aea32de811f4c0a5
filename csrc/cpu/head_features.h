// Products of features with a handful of class vectors. Included inside an ISA-named namespace after head_loss.h.
//
// Features are the user's own rows [n, D]: any address, any D. What is multiplied by them stands in rows padded with
// zeros.

template <class T>
T head_sum(const T* a, int64_t n) {
  VecOf<T> sum = {};
  for (int64_t j = 0; j < n; j += Simd<T>::kLanes) sum += load<T>(a + j);
  return sum_lanes<T>(sum);
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

// Columns col ... col + width of rows [n, D], zeros behind the end, to dst [n, width].
template <class T>
void fill_panel(const T* src, int64_t n, int64_t D, int64_t col, int64_t width, T* dst) {
  for (int64_t r = 0; r < n; ++r, dst += width)
    for (int64_t j = 0; j < width; j += Simd<T>::kLanes) {
      const int64_t left = D - col - j;
      store<T>(dst + j, left > 0 ? load_some<T>(src + r * D + col + j, left) : VecOf<T>{});
    }
}

// to [m, ld] += beta a X for rows X [n, D]; a [m, n] rows, or [n, m] where kColumns. rows: room for a panel of X.
template <class T, bool kColumns>
void add_rows(const T* a, int64_t lda, int64_t m, T beta, const T* X, int64_t n, int64_t D, T* rows, T* to,
              int64_t ld) {
  constexpr int64_t kWidth = kPanelVecs * Simd<T>::kLanes;
  for (int64_t col = 0; col < D; col += kWidth) {
    fill_panel<T>(X, n, D, col, kWidth, rows);
    Gemm<T> g = {to + col, ld, to + col, ld, beta, nullptr, 0, {a, lda, rows, kWidth, n}, {}};
    panel_any<T, kColumns>(int(kPanelVecs), m, g);
  }
}

#if defined(MTMLK_ISA_AVX512)
constexpr int kDotClasses = 5;  // with kDotRows rows: 20 accumulators of 32 registers
#else
constexpr int kDotClasses = 2;
#endif
constexpr int kDotRows = 4;

// out[c, r] += <x_r, w_c> over columns begin ... end for a block of rows and N classes; a missing row repeats the last.
template <class T, int N>
void dot_block(const T* const (&x)[kDotRows], int64_t D, const T* w, int64_t ld, int64_t begin, int64_t end, T* out,
               int64_t ldo, int64_t count) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  VecOf<T> acc[kDotRows][N] = {};
  const auto step = [&](int64_t d, auto read) {
    VecOf<T> row[kDotRows];
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r) {
      __builtin_prefetch(x[r] + kDotRows * D + d, 0, 2);  // the next block's: features come from memory here
      row[r] = read(x[r] + d);
    }
#pragma GCC unroll 5
    for (int c = 0; c < N; ++c) {
      const VecOf<T> by = load<T>(w + c * ld + d);
#pragma GCC unroll 4
      for (int r = 0; r < kDotRows; ++r) acc[r][c] = multiply_add<T>(row[r], by, acc[r][c]);
    }
  };
  int64_t d = begin;
  for (; d + kLanes <= end; d += kLanes) step(d, [](const T* p) { return load_anywhere<T>(p); });
  if (d < end) step(d, [&](const T* p) { return load_first<T>(p, end - d); });
  for (int64_t r = 0; r < count; ++r)
    for (int c = 0; c < N; ++c) out[c * ldo + r] += sum_lanes<T>(acc[r][c]);
}

// out [C, ldo] += w X^T for rows X [m, D] and w [C, ld]: lanes run along D, so that 5 classes cost 5, not a vector.
template <class T>
void head_dots(const T* X, int64_t m, int64_t D, const T* w, int64_t ld, int64_t C, T* out, int64_t ldo) {
  constexpr int64_t kPart = kChain * Simd<T>::kLanes;  // longer chains of additions lose digits
  for (int64_t r = 0; r < m; r += kDotRows) {
    const int64_t count = m - r < kDotRows ? m - r : kDotRows;
    const T* x[kDotRows];
    for (int i = 0; i < kDotRows; ++i) x[i] = X + (r + (i < count ? i : count - 1)) * D;
    for (int64_t begin = 0; begin < D; begin += kPart) {
      const int64_t end = D - begin < kPart ? D : begin + kPart;
      int64_t c = 0;
      for (; c + kDotClasses <= C; c += kDotClasses)
        dot_block<T, kDotClasses>(x, D, w + c * ld, ld, begin, end, out + c * ldo + r, ldo, count);
      for (; c < C; ++c) dot_block<T, 1>(x, D, w + c * ld, ld, begin, end, out + c * ldo + r, ldo, count);
    }
  }
}
