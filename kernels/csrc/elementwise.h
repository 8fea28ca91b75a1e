// The norm and the gated activation.
#pragma once

#include "row_kernels.h"
#include "simd.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

void rms_norm(const NormJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = job.x + row * job.x_stride;
    float* residual = job.residual ? job.residual + row * job.residual_stride : nullptr;
    float* out = job.out + row * job.out_stride;
    F squares = zero();
    for (int64_t i = 0; i < job.width; i += W) {
      const int count = job.width - i < W ? int(job.width - i) : W;
      F value = load_part(x + i, count);
      if (residual) {
        value = add(value, load_part(residual + i, count));
        store_part(residual + i, value, count);
      }
      squares = fma(value, value, squares);
    }
    const float* source = residual ? residual : x;
    const float mean = add_lanes(squares) / float(job.width);
    const F scale = set1(1.0f / __builtin_sqrtf(mean + job.eps));
    for (int64_t i = 0; i < job.width; i += W) {
      const int count = job.width - i < W ? int(job.width - i) : W;
      const F value = mul(load_part(source + i, count), scale);
      store_part(out + i, mul(value, load_part(job.weight + i, count)), count);
    }
  }
}

void silu_mul(const SiluJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* gate = job.gate_up + row * job.x_stride;
    const float* up = gate + job.width;
    float* out = job.out + row * job.out_stride;
    for (int64_t i = 0; i < job.width; i += W) {
      const int count = job.width - i < W ? int(job.width - i) : W;
      const F g = load_part(gate + i, count);
      const F activated = div(g, add(set1(1.0f), exp(sub(zero(), g))));
      store_part(out + i, mul(activated, load_part(up + i, count)), count);
    }
  }
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
