// Rows of activations rounded to int8, in the order in which the products read them.
#pragma once

#include "matmul_kernels.h"
#include "simd.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

struct GroupStatistics {
  float scale;
  int32_t sum;
};

// Codes of up to 32 inputs; what is missing is 0. scale = max |x| / 127, code = rint(x * (127 / max |x|)).
QSERVE_INLINE GroupStatistics quantize_group(const float* x, int64_t count, int8_t* codes) {
  F values[kActivationGroup / W];
  I top = int_zero();
  for (int i = 0; i < kActivationGroup / W; ++i) {
    const int64_t left = count - i * W;
    values[i] = left >= W ? load(x + i * W) : left > 0 ? load_part(x + i * W, int(left)) : zero();
    top = int_max(top, magnitude(values[i]));
  }
  const int32_t bits = int_max_lanes(top);
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  const F inverse = set1(largest > 0.0f ? 127.0f / largest : 0.0f);
  I sum = int_zero();
  for (int i = 0; i < kActivationGroup / W; ++i) {
    const I rounded = round_int(mul(values[i], inverse));
    store_int8(codes + i * W, rounded);
    sum = int_add(sum, rounded);
  }
  return {largest / 127.0f, int_add_lanes(sum)};
}

// One row into its place among the `block` rows that start at block_row.
void quantize_row(const QuantizeJob& job, int64_t block_row, int block, int place) {
  const QuantizedRows& to = job.to;
  const float* x = job.x + (block_row + place) * job.x_stride;
  const int64_t groups = to.padded_k / kActivationGroup;
  int8_t* codes = to.codes + block_row * to.padded_k + 4 * place;
  float* scales = to.scales + block_row * groups + place;
  int32_t* offsets = to.offsets + block_row * groups + place;
  const int64_t per_weight_group = to.group_size / kActivationGroup;
  float* group_sums = to.group_sums + block_row * (groups / per_weight_group) + place;
  alignas(64) int8_t buffer[kActivationGroup];
  float total = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * kActivationGroup;
    int8_t* target = block == 1 ? codes + begin : buffer;
    const GroupStatistics found = quantize_group(x + begin, job.k - begin, target);
    if (block != 1) {
      int8_t* quads = codes + begin * block;
      for (int q = 0; q < kActivationGroup / 4; ++q) __builtin_memcpy(quads + 4 * q * block, buffer + 4 * q, 4);
    }
    scales[g * block] = found.scale;
    offsets[g * block] = -128 * found.sum;
    total += found.scale * float(found.sum);
    if ((g + 1) % per_weight_group == 0) {
      group_sums[(g / per_weight_group) * block] = total;
      total = 0.0f;
    }
  }
}

// begin and end lie on blocks of kRowBlock rows (end may be the last row).
void quantize_rows(const QuantizeJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end;) {
    const int block = block_rows(job.rows - row);
    for (int place = 0; place < block; ++place) quantize_row(job, row, block, place);
    row += block;
  }
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
