// A head into the cache, in each of its formats. kernels/kv_codes.py is the definition, and the codes are the same.
#pragma once

#include "attention_kernels.h"
#include "hadamard.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

constexpr float kFloat8Max = 448.0f, kInt8Max = 127.0f, kInt4Max = 15.0f;
constexpr float kSmallestScale = 0x1p-14f;  // the smallest normal float16

template <typename T>
struct RowType {
  using Element = T;
};

// Calls `function` with the RowType of a format.
template <typename Function>
QSERVE_INLINE void with_row_type(KvFormat format, const Function& function) {
  switch (format) {
    case KvFormat::kFloat32:
      return function(RowType<float>{});
    case KvFormat::kFloat16:
      return function(RowType<Half>{});
    case KvFormat::kBfloat16:
      return function(RowType<Bfloat>{});
    case KvFormat::kFloat8:
      return function(RowType<Float8>{});
    case KvFormat::kInt8:
      return function(RowType<Int8>{});
    case KvFormat::kInt4:
      return function(RowType<Nibbles>{});
  }
}

// Row `at` of heads of `width` elements.
template <typename T>
QSERVE_INLINE T* row_at(const CacheSide& side, int64_t width, int64_t at) {
  return static_cast<T*>(side.codes) + at * (width / kTogether<T>);
}

QSERVE_INLINE float round_to_half(float x, uint16_t* to) {
  Half halves[W];
  store_as(halves, set1(x));
  *to = halves[0].bits;
  alignas(64) float back[W];
  store(back, load_as(halves));
  return back[0];
}

// NaN stays NaN.
QSERVE_INLINE float round_scale(float scale, uint16_t* to) {
  return round_to_half(scale < kSmallestScale ? kSmallestScale : scale, to);
}

QSERVE_INLINE float largest_magnitude(const float* x, int64_t width) {
  I largest = int_zero();
  for (int64_t i = 0; i < width; i += W) {
    const int count = width - i < W ? int(width - i) : W;
    largest = int_max(largest, magnitude(load_part(x + i, count)));
  }
  const int32_t bits = int_max_lanes(largest);
  float found;
  __builtin_memcpy(&found, &bits, sizeof found);
  return found;
}

// (x - offset) / scale between two bounds, a NaN at the lower one.
QSERVE_INLINE F scale_down(const float* x, int count, float offset, float scale, float low, float high) {
  const F steps = div(sub(load_part(x, count), set1(offset)), set1(scale));
  return min(max(steps, set1(low)), set1(high));
}

// The e4m3 of |x| <= 448, to nearest even. A subnormal is rounded by a sum with 2^14, whose last place is 2^-9.
QSERVE_INLINE uint8_t float8_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  const uint32_t normal = ((magnitude + 0x7FFFF + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  const float shifted = (x < 0 ? -x : x) + 0x1p14f;
  uint32_t small;
  __builtin_memcpy(&small, &shifted, sizeof small);
  return uint8_t((magnitude < 0x3C800000 ? small - 0x46800000 : normal) | (bits >> 24 & 0x80));
}

template <typename T>
QSERVE_INLINE void copy_elements(const T* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// Row `at` of a cache from a head of `width` floats: here as floats of the cache's type.
template <typename T>
QSERVE_INLINE void store_row(RowType<T>, const float* head, int64_t width, float*, const CacheSide& side, int64_t at) {
  T* row = row_at<T>(side, width, at);
  int64_t i = 0;
  for (; i + W <= width; i += W) store_as(row + i, load(head + i));
  if (i < width) {
    T tail[W];
    store_as(tail, load_part(head + i, int(width - i)));
    copy_elements(tail, row + i, width - i);
  }
}

QSERVE_INLINE void store_row(RowType<Int8>, const float* head, int64_t width, float*, const CacheSide& side,
                             int64_t at) {
  int8_t* row = &row_at<Int8>(side, width, at)->code;
  const float scale = round_scale(largest_magnitude(head, width) / kInt8Max, side.scales + at);
  for (int64_t i = 0; i < width; i += W) {
    const int count = width - i < W ? int(width - i) : W;
    int8_t codes[W];
    store_int8(codes, round_int(scale_down(head + i, count, 0.0f, scale, -kInt8Max, kInt8Max)));
    copy_elements(codes, row + i, count);
  }
}

QSERVE_INLINE void store_row(RowType<Float8>, const float* head, int64_t width, float*, const CacheSide& side,
                             int64_t at) {
  Float8* row = row_at<Float8>(side, width, at);
  const float scale = round_scale(largest_magnitude(head, width) / kFloat8Max, side.scales + at);
  for (int64_t i = 0; i < width; i += W) {
    const int count = width - i < W ? int(width - i) : W;
    alignas(64) float scaled[W];
    store(scaled, scale_down(head + i, count, 0.0f, scale, -kFloat8Max, kFloat8Max));
    for (int j = 0; j < count; ++j) row[i + j].bits = float8_of(scaled[j]);
  }
}

// scratch: room for the head in whole vectors, twice.
QSERVE_INLINE void store_row(RowType<Nibbles>, const float* head, int64_t width, float* scratch, const CacheSide& side,
                             int64_t at) {
  for (int64_t i = 0; i < width; i += W)
    store(scratch + i, load_part(head + i, width - i < W ? int(width - i) : W));
  rotate_runs(scratch, width, width & -width);
  F low = set1(scratch[0]), high = low, odd = zero();  // odd: 0, or NaN when an element is none or infinite
  for (int64_t i = 0; i < width; i += W) {
    const int count = width - i < W ? int(width - i) : W;
    const F x = select_first(count, load(scratch + i), set1(scratch[0]));
    low = min(x, low);
    high = max(x, high);
    odd = add(odd, sub(x, x));
  }
  const float lowest = -max_lanes(sub(zero(), low)), unsound = add_lanes(odd);
  const float scale = round_scale((max_lanes(high) - lowest) / kInt4Max + unsound, side.scales + at);
  const float offset = round_to_half(lowest + unsound, side.offsets + at);
  int8_t* codes = reinterpret_cast<int8_t*>(scratch + (width + W - 1) / W * W);
  for (int64_t i = 0; i < width; i += W)
    store_int8(codes + i, round_int(scale_down(scratch + i, W, offset, scale, 0.0f, kInt4Max)));
  Nibbles* row = row_at<Nibbles>(side, width, at);
  for (int64_t j = 0; j < width / 2; ++j) row[j].codes = uint8_t(codes[j] | codes[j + width / 2] << 4);
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
