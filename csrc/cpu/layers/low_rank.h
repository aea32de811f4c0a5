// Weights in low-rank form: a task's own weights are never formed.
//
// A gradient of a linear layer is dW = A^T D, with its inputs A and the gradients D at its outputs, a row a sample. So
//   theta_k        = theta_0 - sum_{j < k} alpha_j A_j^T D_j             j: the support set at step j
//   lambda_{k+1}   = A_q^T D_q + sum_{j > k} (A_j^T Dt_j + At_j^T D_j)    q: the query set
//   V = -alpha_k lambda_{k+1}
// and with the planes of all passes at hand each product with a task's weights is one with the shared theta_0, which
// all tasks read, and thin ones:
//   x theta_k   = x theta_0 - sum_j alpha_j (x A_j^T) D_j
//   y theta_k^T = y theta_0^T - sum_j alpha_j (y D_j^T) A_j              likewise V
// lambda_0 summed over the tasks is one product over the rows of all of them (low_rank_sum.h). A step costs S (I + O)
// multiplications a row instead of the passes over I x O elements that writing, transposing and reading a task's
// weights take.
#pragma once

#include <stdint.h>

#include "simd/dots.h"
#include "simd/gemm.h"
#include "inner_loop/plan/plan.h"
#include "layers/block.h"

namespace mtmlk {
namespace {

// `by` A^T D of a pass, for every weight in low-rank form.
template <class T>
struct Factor {
  const Block<T>* block;
  Plane a, d;
  const T* by;  // [n_params]
};

template <class T>
struct LowRank {
  const Factor<T>* theta;  // [n_theta] theta_k - theta_0
  const Factor<T>* along;  // [n_along] V
  int64_t n_theta, n_along;
  T* gram;  // [longest pass, longest pass]
  // Of each layer, side and step j: what the query set's products with the step's factor were, which are those of the
  // step with the query set's factor, transposed.
  T* kept;            // [steps, 2, n_params, kept_size]
  int64_t kept_size;  // query rows x support rows
};

// A layer whose inputs depend on no adapted parameter has no tangents At.
template <class T>
bool applies(const Factor<T>& f, const ValuePlan& v) {
  return f.a != kTangent || f.block->plan->values[v.a].tan;
}

// Both sides of a layer's factor: rows of A and of D.
template <class T>
RowsOf<T> factor_inputs(const Factor<T>& f, const ValuePlan& v) {
  const ValuePlan& a = f.block->plan->values[v.a];
  return {plane_of(*f.block, v.a, f.a), f.a == kPrimal ? a.ld_primal : a.ld, rows_of(*f.block, v)};
}

template <class T>
RowsOf<T> factor_outputs(const Factor<T>& f, const ValuePlan& v) {
  return {plane_of(*f.block, v.self, f.d), v.ld, rows_of(*f.block, v)};
}

// gram [x, y] = by X Y^T
template <class T>
void gram_of(const RowsOf<T>& x, const RowsOf<T>& y, int64_t columns, T by, T* gram) {
  const int64_t n = x.count * y.count;
  for (int64_t i = 0; i < n; ++i) gram[i] = T(0);
  if (x.count < y.count)
    row_dots<T>(y, x, columns, gram, y.count, 1);
  else
    row_dots<T>(x, y, columns, gram, 1, y.count);
  for (int64_t i = 0; i < n; ++i) gram[i] *= by;
}

// What multiplies a list of factors from the left.
template <class T>
struct Term {
  RowsOf<T> x;
  const Factor<T>* factors;
  int64_t count;
};

template <class T>
int64_t count_factors(const Term<T>& term, const ValuePlan& v) {
  int64_t n = 0;
  for (int64_t i = 0; i < term.count; ++i) n += applies(term.factors[i], v);
  return n;
}

template <class T>
T* kept_gram(const Block<T>& b, const ValuePlan& v, bool to_inputs, int64_t step) {
  return b.low->kept + ((2 * step + to_inputs) * b.plan->n_params + v.weight) * b.low->kept_size;
}

// gram = by X Y^T of a term's rows and a factor's, or the transpose of what the query set's pass has kept.
template <class T>
const T* term_gram(const Block<T>& b, const ValuePlan& v, bool to_inputs, const RowsOf<T>& x, const Factor<T>& f,
                   bool along) {
  const RowsOf<T> y = to_inputs ? factor_outputs(f, v) : factor_inputs(f, v);
  const bool query = b.pass == b.plan->steps, with_query = along && f.block->pass == b.plan->steps;
  if (with_query) {
    const T* kept = kept_gram(b, v, to_inputs, b.pass);
    for (int64_t r = 0; r < x.count; ++r)
      for (int64_t c = 0; c < y.count; ++c) b.low->gram[r * y.count + c] = kept[c * x.count + r];
    return b.low->gram;
  }
  T* gram = query ? kept_gram(b, v, to_inputs, f.block->pass) : b.low->gram;
  gram_of<T>(x, y, to_inputs ? v.features : b.plan->values[v.a].features, f.by[v.weight], gram);
  return gram;
}

// C (in g, with the product with theta_0, if any, as p1) plus the terms' factors: (X A^T) D, or (Y D^T) A where
// `to_inputs`. One pass over C for the first factor, one more for each other.
template <class T>
void multiply_low_rank(const Block<T>& b, const ValuePlan& v, bool to_inputs, int64_t rows, int64_t n, Gemm<T> g,
                       const Term<T> (&terms)[2]) {
  const T* gate = g.gate;
  int64_t left = count_factors(terms[0], v) + count_factors(terms[1], v);
  if (left == 0) return multiply_packed<T>(rows, n, g);
  bool base = g.p1.k > 0;
  for (const Term<T>& term : terms)
    for (int64_t i = 0; i < term.count; ++i) {
      const Factor<T>& f = term.factors[i];
      if (!applies(f, v)) continue;
      const RowsOf<T> z = to_inputs ? factor_inputs(f, v) : factor_outputs(f, v);
      const Product<T> thin = {term_gram(b, v, to_inputs, term.x, f, &term == &terms[1]), z.count, z.at, z.ld, z.count};
      g.gate = --left ? nullptr : gate;
      (base ? g.p2 : g.p1) = thin;
      Gemm<T> pass = g;
      if (base)
        multiply_packed_and_rows<T>(rows, n, pass);
      else
        multiply_rows<T, false>(rows, n, pass);
      base = false;
      g.d = g.c, g.ldd = g.ldc, g.p2 = {};
    }
}

// <A^T D, lambda_{k+1}> = sum over lambda's factors of <A A'^T, D D'^T>.
template <class T>
double low_rank_inner(const Factor<T>& g, const LowRank<T>& low, const ValuePlan& v, int64_t inputs) {
  const RowsOf<T> a = factor_inputs(g, v), d = factor_outputs(g, v);
  double total = 0;
  for (int64_t i = 0; i < low.n_along; ++i) {
    const Factor<T>& f = low.along[i];
    if (!applies(f, v)) continue;
    const RowsOf<T> a2 = factor_inputs(f, v), d2 = factor_outputs(f, v);
    const int64_t n = a.count * a2.count;
    T *left = low.gram, *right = low.gram + n;
    gram_of<T>(a, a2, inputs, T(1), left);
    gram_of<T>(d, d2, v.features, T(1), right);
    for (int64_t e = 0; e < n; ++e) total += double(left[e]) * double(right[e]);
  }
  return total;
}

}  // namespace
}  // namespace mtmlk
