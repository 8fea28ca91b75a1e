// Root-mean-square norm, the same rounded to int8, and layer norm.
#pragma once

#include "row_kernels.h"
#include "simd.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

QSERVE_INLINE int lanes_left(const NormJob& job, int64_t i) { return job.width - i < W ? int(job.width - i) : W; }

// The row that is normed: x, or residual + x, which replaces the residual.
QSERVE_INLINE const float* add_residual(const NormJob& job, int64_t row) {
  const float* x = job.x + row * job.x_stride;
  if (!job.residual) return x;
  float* residual = job.residual + row * job.residual_stride;
  for (int64_t i = 0; i < job.width; i += W) {
    const int count = lanes_left(job, i);
    store_part(residual + i, add(load_part(x + i, count), load_part(residual + i, count)), count);
  }
  return residual;
}

QSERVE_INLINE float rms_scale(const NormJob& job, const float* x) {
  F squares = zero();
  for (int64_t i = 0; i < job.width; i += W) {
    const F value = load_part(x + i, lanes_left(job, i));
    squares = fma(value, value, squares);
  }
  return 1.0f / __builtin_sqrtf(add_lanes(squares) / float(job.width) + job.eps);
}

QSERVE_INLINE F rms_normed(const NormJob& job, const float* x, F scale, int64_t i, int count) {
  const F weight = add(load_part(job.weight + i, count), set1(job.weight_offset));
  return mul(mul(load_part(x + i, count), scale), weight);
}

void rms_norm(const NormJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = add_residual(job, row);
    const F scale = set1(rms_scale(job, x));
    float* out = job.out + row * job.out_stride;
    for (int64_t i = 0; i < job.width; i += W) {
      const int count = lanes_left(job, i);
      store_part(out + i, rms_normed(job, x, scale, i, count), count);
    }
  }
}

// The norm is computed twice, for its largest magnitude and for the codes: cheaper than a place to keep it.
void rms_norm_int8(const RoundedNormJob& job, int64_t begin, int64_t end) {
  const NormJob& norm = job.norm;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = add_residual(norm, row);
    const F scale = set1(rms_scale(norm, x));
    I top = int_zero();
    for (int64_t i = 0; i < norm.width; i += W)
      top = int_max(top, magnitude(rms_normed(norm, x, scale, i, lanes_left(norm, i))));
    const int32_t bits = int_max_lanes(top);
    float largest;
    __builtin_memcpy(&largest, &bits, 4);
    job.scales[row] = largest / 127.0f;
    const F inverse = set1(largest > 0.0f ? 127.0f / largest : 0.0f);
    int8_t* codes = job.codes + row * norm.width;
    for (int64_t i = 0; i < norm.width; i += W) {
      const int count = lanes_left(norm, i);
      int8_t rounded[W];
      store_int8(rounded, round_int(mul(rms_normed(norm, x, scale, i, count), inverse)));
      __builtin_memcpy(codes + i, rounded, count);
    }
  }
}

void layer_norm(const LayerNormJob& job, int64_t begin, int64_t end) {
  const NormJob& norm = job.norm;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = add_residual(norm, row);
    F sum = zero(), squares = zero();
    for (int64_t i = 0; i < norm.width; i += W) sum = add(sum, load_part(x + i, lanes_left(norm, i)));
    const F mean = set1(add_lanes(sum) / float(norm.width));
    for (int64_t i = 0; i < norm.width; i += W) {
      const int count = lanes_left(norm, i);
      const F distance = select_first(count, sub(load_part(x + i, count), mean), zero());
      squares = fma(distance, distance, squares);
    }
    const F scale = set1(1.0f / __builtin_sqrtf(add_lanes(squares) / float(norm.width) + norm.eps));
    float* out = norm.out + row * norm.out_stride;
    for (int64_t i = 0; i < norm.width; i += W) {
      const int count = lanes_left(norm, i);
      const F value = mul(mul(sub(load_part(x + i, count), mean), scale), load_part(norm.weight + i, count));
      store_part(out + i, job.bias ? add(value, load_part(job.bias + i, count)) : value, count);
    }
  }
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
