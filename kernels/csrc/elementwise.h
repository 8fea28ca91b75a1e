// The gated activations, soft caps, and the sum over the experts of a row.
#pragma once

#include "row_kernels.h"
#include "simd.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

// x / (1 + e^-x)
QSERVE_INLINE F silu(F x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

// x * Phi(x), Phi the normal distribution: max(x, 0) - |x| * Phi(-|x|), where nothing cancels. With t = 1 / (1 + 0.35 a),
// Phi(-a) = e^(-a^2 / 2) * t * Q(t); Q is our own fit (Chebyshev nodes, relative error below 4e-8 for a in 0..13).
QSERVE_INLINE F gelu(F x) {
  const F a = min(set1(20.0f), max(sub(zero(), x), x));  // further out Phi(-a) is nothing, and infinity * nothing is NaN
  const F t = div(set1(1.0f), fma(a, set1(0.35f), set1(1.0f)));
  F q = set1(-2.9609795659780502e-2f);
  q = fma(q, t, set1(1.4622420072555542e-1f));
  q = fma(q, t, set1(-2.6033791899681091e-1f));
  q = fma(q, t, set1(1.6439174115657806e-1f));
  q = fma(q, t, set1(-2.6633098721504211e-2f));
  q = fma(q, t, set1(1.0695824027061462e-1f));
  q = fma(q, t, set1(1.1947943270206451e-1f));
  q = fma(q, t, set1(1.3990826904773712e-1f));
  q = fma(q, t, set1(1.3961890339851379e-1f));
  const F tail = mul(exp(mul(mul(a, a), set1(-0.5f))), mul(q, t));
  return sub(max(zero(), x), mul(a, tail));
}

// x * (1 + tanh u) / 2 = x / (1 + e^(-2 u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3)
QSERVE_INLINE F gelu_tanh(F x) {
  const F inner = fma(mul(mul(x, x), set1(0.044715f)), x, x);
  return div(x, add(set1(1.0f), exp(mul(inner, set1(-1.5957691216057308f)))));
}

template <Gate gate>
QSERVE_INLINE void gate_rows(const GateJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = job.gate_up + row * job.x_stride;
    const float* up = x + job.width;
    float* out = job.out + row * job.out_stride;
    for (int64_t i = 0; i < job.width; i += W) {
      const int count = job.width - i < W ? int(job.width - i) : W;
      const F g = load_part(x + i, count);
      const F opened = gate == Gate::kSilu ? silu(g) : gate == Gate::kGelu ? gelu(g) : gelu_tanh(g);
      store_part(out + i, mul(opened, load_part(up + i, count)), count);
    }
  }
}

void gated_activation(const GateJob& job, int64_t begin, int64_t end) {
  switch (job.gate) {
    case Gate::kSilu:
      return gate_rows<Gate::kSilu>(job, begin, end);
    case Gate::kGelu:
      return gate_rows<Gate::kGelu>(job, begin, end);
    case Gate::kGeluTanh:
      return gate_rows<Gate::kGeluTanh>(job, begin, end);
  }
}

// (1 - e^(-2 u)) / (1 + e^(-2 u)); further out than 10 it is 1. A NaN stays one: min and max give their second operand then.
QSERVE_INLINE F tanh(F u) {
  const F decay = exp(mul(max(set1(-10.0f), min(set1(10.0f), u)), set1(-2.0f)));
  return div(sub(set1(1.0f), decay), add(set1(1.0f), decay));
}

void soft_cap(const SoftCapJob& job, int64_t begin, int64_t end) {
  const F cap = set1(job.cap), inverse = set1(1.0f / job.cap);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t i = 0; i < job.width; i += W) {
      const int count = job.width - i < W ? int(job.width - i) : W;
      const F x = load_part(job.x + row * job.x_stride + i, count);
      store_part(job.out + row * job.out_stride + i, mul(cap, tanh(mul(x, inverse))), count);
    }
  }
}

void weighted_sum(const WeightedSumJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = job.x + row * job.count * job.width;
    const float* weights = job.weights + row * job.count;
    float* out = job.out + row * job.out_stride;
    for (int64_t i = 0; i < job.width; i += W) {
      const int count = job.width - i < W ? int(job.width - i) : W;
      F sum = zero();
      for (int64_t j = 0; j < job.count; ++j) sum = fma(set1(weights[j]), load_part(x + j * job.width + i, count), sum);
      store_part(out + i, sum, count);
    }
  }
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
