// The largest of a row, and what a draw from its softmax needs to know of each stretch.
#pragma once

#include "row_kernels.h"
#include "simd.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

constexpr int32_t kInfinityBits = 0x7F800000;

// NaN if one of them is: magnitudes compared as integers tell, which comparisons of floats lose.
float largest(const float* x, int64_t count) {
  const F lowest = set1(-__builtin_inff());
  F top = lowest;
  I magnitudes = int_zero();
  for (int64_t i = 0; i < count; i += W) {
    const int lanes = count - i < W ? int(count - i) : W;
    const F value = load_part(x + i, lanes);
    magnitudes = int_max(magnitudes, magnitude(value));
    top = max(top, select_first(lanes, value, lowest));
  }
  return int_max_lanes(magnitudes) > kInfinityBits ? __builtin_nanf("") : max_lanes(top);
}

float sum_of_weights(const float* x, int64_t count, float top, float scale) {
  F sum = zero();
  for (int64_t i = 0; i < count; i += W) {
    const int lanes = count - i < W ? int(count - i) : W;
    const F weight = exp(mul(sub(load_part(x + i, lanes), set1(top)), set1(scale)));
    sum = add(sum, select_first(lanes, weight, zero()));
  }
  return add_lanes(sum);
}

void summarize(const SummaryJob& job) {
  for (int64_t i = 0, stretch = 0; i < job.count; i += kStretch, ++stretch) {
    const int64_t count = job.count - i < kStretch ? job.count - i : kStretch;
    const float top = largest(job.x + i, count);
    job.tops[stretch] = top;
    if (job.sums) job.sums[stretch] = top == -__builtin_inff() ? 0.0f : sum_of_weights(job.x + i, count, top, job.scale);
  }
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
