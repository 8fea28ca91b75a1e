// Rows of activations rounded to 8 bits: to int8 in the order in which the integer products read them, or to floats.
#pragma once

#include "matmul_kernels.h"
#include "simd.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

constexpr int kGroupVectors = int(kActivationGroup) / W;

// Up to 32 inputs; what is missing is 0.
struct Group {
  F values[kGroupVectors];
};

QSERVE_INLINE Group load_group(const float* x, int64_t count) {
  Group group;
  for (int i = 0; i < kGroupVectors; ++i) {
    const int64_t left = count - i * W;
    group.values[i] = left >= W ? load(x + i * W) : left > 0 ? load_part(x + i * W, int(left)) : zero();
  }
  return group;
}

// max |x| of the inputs from x on, NaN if one is.
QSERVE_INLINE float largest_magnitude(const float* x, int64_t count) {
  I top = int_zero();
  for (int64_t begin = 0; begin < count; begin += kActivationGroup) {
    const Group group = load_group(x + begin, count - begin);
    for (const F& values : group.values) top = int_max(top, magnitude(values));
  }
  const int32_t bits = int_max_lanes(top);
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  return largest;
}

// Inputs that share a scale: scale = max |x| / top, code = rint(x * (top / max |x|)) for codes of -top..top.
struct Scaling {
  float scale, inverse;
};

QSERVE_INLINE Scaling scaling_of(const float* x, int64_t count, float top) {
  const float largest = largest_magnitude(x, count);
  return {largest / top, largest > 0.0f ? top / largest : 0.0f};
}

// Int8 codes of up to 32 inputs, and their sum.
QSERVE_INLINE int32_t quantize_group(const float* x, int64_t count, float inverse, int8_t* codes) {
  const Group group = load_group(x, count);
  I sum = int_zero();
  for (int i = 0; i < kGroupVectors; ++i) {
    const I rounded = round_int(mul(group.values[i], set1(inverse)));
    store_int8(codes + i * W, rounded);
    sum = int_add(sum, rounded);
  }
  return int_add_lanes(sum);
}

// One row into its place among the `block` rows that start at block_row.
void quantize_row(const RoundJob& job, int64_t block_row, int block, int place) {
  const QuantizedRows& to = job.to;
  const float* x = job.x + (block_row + place) * job.x_stride;
  const int64_t groups = to.padded_k / kActivationGroup;
  int8_t* codes = to.codes + block_row * to.padded_k + 4 * place;
  float* scales = to.scales + block_row * groups + place;
  int32_t* offsets = to.offsets + block_row * groups + place;
  const int64_t per_weight_group = to.group_size / kActivationGroup;
  float* group_sums = to.group_sums + block_row * (groups / per_weight_group) + place;
  const bool whole = job.activations == Activations::kInt8Token;
  Scaling scaling{};
  if (whole) scaling = scaling_of(x, job.k, 127.0f);
  alignas(64) int8_t buffer[kActivationGroup];
  float total = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * kActivationGroup, left = job.k - begin;
    if (!whole) scaling = scaling_of(x + begin, left < kActivationGroup ? left : kActivationGroup, 127.0f);
    const int32_t sum = quantize_group(x + begin, left, scaling.inverse, block == 1 ? codes + begin : buffer);
    if (block != 1) {
      int8_t* quads = codes + begin * block;
      for (int q = 0; q < kActivationGroup / 4; ++q) __builtin_memcpy(quads + 4 * q * block, buffer + 4 * q, 4);
    }
    scales[g * block] = scaling.scale;
    offsets[g * block] = -128 * sum;
    total += scaling.scale * float(sum);
    if ((g + 1) % per_weight_group == 0) {
      group_sums[(g / per_weight_group) * block] = total;
      total = 0.0f;
    }
  }
}

// begin and end lie on blocks of kRowBlock rows (end may be the last row).
void quantize_rows(const RoundJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end;) {
    const int block = block_rows(job.rows - row);
    for (int place = 0; place < block; ++place) quantize_row(job, row, block, place);
    row += block;
  }
}

// A number of magnitude up to 448 to the nearest float8 e4m3, of two the even one: 3 bits after the first, and steps of 2^-9
// below 2^-6. The sum with a number 2^20 times as large as the power of two below has no room for more bits.
QSERVE_INLINE F round_float8(F x) {
  const F steps = mul(exponent(max(max(x, sub(zero(), x)), set1(0x1p-6f))), set1(1.5f * 0x1p20f));
  return sub(add(x, steps), steps);
}

// Inputs that share a scale, rounded and back to floats, up to the end of a group of 32.
QSERVE_INLINE void round_inputs(const float* x, int64_t count, Activations activations, float* to) {
  const bool exact = activations == Activations::kFloat32, to_float8 = activations == Activations::kFloat8Token;
  const Scaling scaling = exact ? Scaling{} : scaling_of(x, count, to_float8 ? 448.0f : 127.0f);
  for (int64_t begin = 0; begin < count; begin += kActivationGroup) {
    const Group group = load_group(x + begin, count - begin);
    for (int i = 0; i < kGroupVectors; ++i) {
      const F scaled = mul(group.values[i], set1(scaling.inverse));
      const F rounded = mul(to_float8 ? round_float8(scaled) : to_float(round_int(scaled)), set1(scaling.scale));
      store(to + begin + i * W, exact ? group.values[i] : rounded);
    }
  }
}

// Rows to floats, padded with zeros to whole groups of the weight.
void round_rows(const RoundJob& job, int64_t begin, int64_t end) {
  const int64_t together = job.activations == Activations::kInt8 ? kActivationGroup : job.k;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = job.x + row * job.x_stride;
    float* to = job.floats + row * job.to.padded_k;
    for (int64_t k = 0; k < job.k; k += together)
      round_inputs(x + k, together < job.k - k ? together : job.k - k, job.activations, to + k);
    const int64_t written = (job.k + kActivationGroup - 1) / kActivationGroup * kActivationGroup;
    for (int64_t k = written; k < job.to.padded_k; k += W) store(to + k, zero());
  }
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
