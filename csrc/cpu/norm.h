// Batch, group and instance normalisation with the relu and the max-pooling after it. Included inside an ISA-named
// namespace after norm_sums.h.
//
//   forward            xhat = r (z - mean)                 y   = act(gamma xhat + beta), pooled
//   backward           dz   = r (gamma dy' - m1 - xhat m2)              dgamma  = s2     dbeta  = s1
//   tangent            yt   = act' (gamma xhatt + gamma' xhat + beta')
//   tangent backward   dzt  = r' / r dz + r (gamma dyt' + gamma' dy' - m1t - xhatt m2 - xhat m2t)
//                                                                       dgammat = s2t    dbetat = s1t
// Everything is linear in z - mean, zt, dy' and dyt' with coefficients of the feature alone, so that each pass reads
// its planes once. dy' is 0 but at the places that won their pooling windows; the winner is the first that equals the
// peak.

// One output of a stream: out = centre (z - mean) + tangent (zt - mean') + grad dy' + grad_t dyt' + shift, rows of ld.
// Those that a pass does not need are not read.
template <class T>
struct Affine {
  T *centre, *tangent, *grad, *grad_t, *shift;
};

template <class T>
Affine<T> affine_at(T* p, int64_t ld) {
  return {p, p + ld, p + 2 * ld, p + 3 * ld, p + 4 * ld};
}

// Windows of cells_y x cells_x pixels, side by side from the image's upper left corner.
struct PoolShape {
  int64_t width, out_height, out_width, cells_y, cells_x, height;
};

MTMLK_INLINE PoolShape pool_shape(const Plan& plan, const NormPlan& n) {
  const int64_t* w = plan.values[n.tail].window;
  return {w[kWidth], w[kOutHeight], w[kOutWidth], w[kKernelY], w[kKernelX], w[kHeight]};
}

template <class T>
MTMLK_INLINE VecOf<T> activated(VecOf<T> x, T slope) {
  return x <= T(0) ? times_slope<T>(slope, x) : x;
}

// y of one sample; `k` has gamma r in centre and beta in shift
template <class T>
void norm_sample_forward(const T* z, const T* mean, const Affine<T>& k, int64_t rows, int64_t ld, T slope, T* y) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
      const VecOf<T> x = load<T>(z + r * ld + c) - load<T>(mean + c);
      store<T>(y + r * ld + c, activated<T>(multiply_add<T>(load<T>(k.centre + c), x, load<T>(k.shift + c)), slope));
    }
}

template <class T>
void pool_sample_forward(const T* z, const T* mean, const Affine<T>& k, const PoolShape& p, int64_t ld, T slope, T* y,
                         T* peak) {
  for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
    const VecOf<T> m = load<T>(mean + c), scale = load<T>(k.centre + c), shift = load<T>(k.shift + c);
    for (int64_t oy = 0; oy < p.out_height; ++oy)
      for (int64_t ox = 0; ox < p.out_width; ++ox) {
        const T* from = z + (oy * p.cells_y * p.width + ox * p.cells_x) * ld + c;
        VecOf<T> top = load<T>(from), best = multiply_add<T>(scale, top - m, shift);
        for (int64_t cy = 0; cy < p.cells_y; ++cy)
          for (int64_t cx = cy == 0; cx < p.cells_x; ++cx) {
            const VecOf<T> x = load<T>(from + (cy * p.width + cx) * ld);
            const VecOf<T> value = multiply_add<T>(scale, x - m, shift);
            const auto wins = (value > best) | (value != value);
            best = wins ? value : best, top = wins ? x : top;
          }
        const int64_t at = (oy * p.out_width + ox) * ld + c;
        store<T>(y + at, activated<T>(best, slope));
        store<T>(peak + at, top);
      }
  }
}

// yt of one sample: tangent, centre and shift of `k`
template <class T>
void norm_sample_tangent(const T* z, const T* zt, const T* mean, const T* mean_t, const Affine<T>& k, int64_t rows,
                         int64_t ld, T slope, const T* y, T* yt) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
      const int64_t at = r * ld + c;
      const VecOf<T> x = load<T>(z + at) - load<T>(mean + c);
      VecOf<T> value = multiply_add<T>(load<T>(k.centre + c), x, load<T>(k.shift + c));
      if (zt) value = multiply_add<T>(load<T>(k.tangent + c), load<T>(zt + at) - load<T>(mean_t + c), value);
      store<T>(yt + at, masked<T>(y + at, value, slope));
    }
}

// peak_t <- zt at the winners
template <class T>
void pool_sample_tangent(const T* z, const T* zt, const PoolShape& p, int64_t ld, const T* peak, T* peak_t) {
  using Mask = IntOf<T>;
  for (int64_t c = 0; c < ld; c += Simd<T>::kLanes)
    for (int64_t oy = 0; oy < p.out_height; ++oy)
      for (int64_t ox = 0; ox < p.out_width; ++ox) {
        const int64_t from = (oy * p.cells_y * p.width + ox * p.cells_x) * ld + c,
                      at = (oy * p.out_width + ox) * ld + c;
        const VecOf<T> top = load<T>(peak + at);
        VecOf<T> found = load<T>(zt + from);
        Mask open = ~(Mask)(load<T>(z + from) == top);
        for (int64_t cy = 0; cy < p.cells_y; ++cy)
          for (int64_t cx = cy == 0; cx < p.cells_x; ++cx) {
            const int64_t cell = from + (cy * p.width + cx) * ld;
            const Mask wins = (Mask)(load<T>(z + cell) == top) & open;
            found = wins ? load<T>(zt + cell) : found;
            open &= ~wins;
          }
        store<T>(peak_t + at, found);
      }
}

// What a sample's dz (or dzt) is made of. The planes start at the sample.
template <class T>
struct GradStream {
  const T *z, *zt;        // zt nullptr: no tangent
  const T *y, *dy, *dyt;  // at the tail's places; dyt nullptr: the first gradient alone
  const T *mean, *mean_t, *peak;
  Affine<T> k;
  T slope;
  bool add;
  T* out;
};

template <class T>
MTMLK_INLINE VecOf<T> stream_base(const GradStream<T>& s, int64_t at, int64_t c) {
  VecOf<T> value =
      multiply_add<T>(load<T>(s.k.centre + c), load<T>(s.z + at) - load<T>(s.mean + c), load<T>(s.k.shift + c));
  if (s.zt) value = multiply_add<T>(load<T>(s.k.tangent + c), load<T>(s.zt + at) - load<T>(s.mean_t + c), value);
  if (s.add) value += load<T>(s.out + at);
  return value;
}

// The part of dz that comes from one place of y.
template <class T>
MTMLK_INLINE VecOf<T> stream_grad(const GradStream<T>& s, int64_t at, int64_t c) {
  VecOf<T> g = {};
  if (s.dy) g = load<T>(s.k.grad + c) * load<T>(s.dy + at);
  if (s.dyt) g = multiply_add<T>(load<T>(s.k.grad_t + c), load<T>(s.dyt + at), g);
  return masked<T>(s.y + at, g, s.slope);
}

// Pixels [rows.first, rows.end).
template <class T>
void norm_sample_backward(const GradStream<T>& s, Range rows, int64_t ld) {
  for (int64_t r = rows.first; r < rows.end; ++r)
    for (int64_t c = 0; c < ld; c += Simd<T>::kLanes)
      store<T>(s.out + r * ld + c, stream_base<T>(s, r * ld + c, c) + stream_grad<T>(s, r * ld + c, c));
}

template <class T>
void pool_window_backward(const GradStream<T>& s, const PoolShape& p, int64_t ld, int64_t oy, int64_t ox) {
  using Mask = IntOf<T>;
  const int64_t corner = (oy * p.cells_y * p.width + ox * p.cells_x) * ld, output = (oy * p.out_width + ox) * ld;
  for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
    const VecOf<T> top = load<T>(s.peak + output + c), grad = stream_grad<T>(s, output + c, c);
    Mask open = ~Mask{};
    for (int64_t cy = 0; cy < p.cells_y; ++cy)
      for (int64_t cx = 0; cx < p.cells_x; ++cx) {
        const int64_t cell = corner + (cy * p.width + cx) * ld + c;
        const Mask wins = (Mask)(load<T>(s.z + cell) == top) & open;
        open &= ~wins;
        store<T>(s.out + cell, stream_base<T>(s, cell, c) + (wins ? grad : VecOf<T>{}));
      }
  }
}

// Image rows [rows.first, rows.end), which begin and, but for the last, end with a window. Pixels that pooling leaves
// out still count in the statistics.
template <class T>
void pool_sample_backward(const GradStream<T>& s, const PoolShape& p, Range rows, int64_t ld) {
  const int64_t used_x = p.out_width * p.cells_x;
  for (int64_t y = rows.first; y < rows.end; ++y) {
    const bool used = y < p.out_height * p.cells_y;
    for (int64_t ox = 0; used && y % p.cells_y == 0 && ox < p.out_width; ++ox)
      pool_window_backward<T>(s, p, ld, y / p.cells_y, ox);
    for (int64_t x = used ? used_x : 0; x < p.width; ++x)
      for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
        const int64_t at = (y * p.width + x) * ld + c;
        store<T>(s.out + at, stream_base<T>(s, at, c));
      }
  }
}
