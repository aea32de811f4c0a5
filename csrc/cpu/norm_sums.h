// Sums of gradients that normalisations need. Included inside an ISA-named namespace after norm_stats.h.
//
//   dy'  = dy (slope where y <= 0)              the activation's derivative
//   s1   = sum dy'        s2  = sum dy' xhat                                   over a set, feature by feature
//   m1   = mean gamma dy' m2  = mean gamma dy' xhat                            over what shares a mean
//   s1t  = sum dyt'       s2t = sum dyt' xhat + dy' xhatt
// With max-pooling behind it, dy lies at the pooled places, and z there is the peak.

template <class T>
struct NormPlanes {
  const T *z, *zt;  // at the places of y: the value itself, or its peaks
  const T *y, *dy, *dyt;
  T slope;
};

template <class T>
NormPlanes<T> norm_planes(const Block<T>& b, const ValuePlan& v) {
  const NormPlan& n = *v.norm;
  NormPlanes<T> p = {plane_of(b, v.a, kPrimal),   plane_of(b, v.a, kTangent),         plane_of(b, n.tail, kPrimal),
                     plane_of(b, n.tail, kDelta), plane_of(b, n.tail, kDeltaTangent), T(n.slope)};
  if (n.pooled) p.z = b.planes[kPrimal] + n.peak * b.stride, p.zt = b.planes[kTangent] + n.peak_tangent * b.stride;
  return p;
}

// 0 times an infinite gradient would be NaN where relu's is 0.
template <class T>
MTMLK_INLINE VecOf<T> times_slope(T slope, VecOf<T> x) {
  return slope == T(0) ? VecOf<T>{} : slope * x;
}

template <class T>
MTMLK_INLINE VecOf<T> masked(const T* y, VecOf<T> g, T slope) {
  return load<T>(y) <= T(0) ? times_slope<T>(slope, g) : g;
}

// slot <- s1, s2 of rows that lie one after another; `g` is dy or dyt
template <class T>
void row_sums(const NormPlanes<T>& p, const T* g, int64_t at, int64_t rows, int64_t ld, const Coefs<T>& k, T* slot) {
  for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
    const VecOf<T> mean = load<T>(k.mean + c), rest = load<T>(k.rest + c), r = load<T>(k.r + c);
    VecOf<T> s1 = {}, s2 = {};
    for (int64_t i = at + c; i < at + rows * ld + c; i += ld) {
      const VecOf<T> d = masked<T>(p.y + i, load<T>(g + i), p.slope);
      s1 += d;
      s2 = multiply_add<T>(d, load<T>(p.z + i) - mean - rest, s2);
    }
    store<T>(slot + c, s1);
    store<T>(slot + ld + c, s2 * r);
  }
}

// slot <- s1t, s2t;  xhatt = r (zt - mean') + r' (z - mean)
template <class T>
void row_sums_tangent(const NormPlanes<T>& p, int64_t at, int64_t rows, int64_t ld, const Coefs<T>& k,
                      const Coefs<T>& kt, T* slot) {
  for (int64_t c = 0; c < ld; c += Simd<T>::kLanes) {
    const VecOf<T> mean = load<T>(k.mean + c), rest = load<T>(k.rest + c), r = load<T>(k.r + c);
    const VecOf<T> mean_t = load<T>(kt.mean + c), rest_t = load<T>(kt.rest + c), r_t = load<T>(kt.r + c);
    VecOf<T> s1 = {}, s2 = {};
    for (int64_t i = at + c; i < at + rows * ld + c; i += ld) {
      const VecOf<T> dt = masked<T>(p.y + i, load<T>(p.dyt + i), p.slope);
      const VecOf<T> d = masked<T>(p.y + i, load<T>(p.dy + i), p.slope);
      const VecOf<T> centred = load<T>(p.z + i) - mean - rest;
      const VecOf<T> xhat_t = multiply_add<T>(r, load<T>(p.zt + i) - mean_t - rest_t, r_t * centred);
      s1 += dt;
      s2 = multiply_add<T>(dt, centred * r, multiply_add<T>(d, xhat_t, s2));
    }
    store<T>(slot + c, s1);
    store<T>(slot + ld + c, s2);
  }
}

// m1, m2 of a set from s1, s2, or their tangents from s1t, s2t and the first ones:  m1t = mean gamma s1t + gamma' s1
template <class T>
void group_means(const SetView& s, const T* gamma, const T* gamma_t, const double* s1, const double* s2,
                 const Coefs<T>& first, T* m1, T* m2) {
  for (int64_t g = 0; g < s.groups; ++g) {
    double sum1 = 0, sum2 = 0;
    for (int64_t c = g * s.per_group; c < (g + 1) * s.per_group; ++c) {
      const double by = gamma ? double(gamma[c]) : 1;
      sum1 += by * s1[c], sum2 += by * s2[c];
      if (gamma_t) sum1 += double(gamma_t[c]) * double(first.s1[c]), sum2 += double(gamma_t[c]) * double(first.s2[c]);
    }
    for (int64_t c = g * s.per_group; c < (g + 1) * s.per_group; ++c)
      m1[c] = T(sum1 / s.count), m2[c] = T(sum2 / s.count);
  }
}
