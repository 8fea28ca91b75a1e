// Vectors of 8 lanes in plain C++: any machine; the compiler makes of it what it can.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernel_table.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

constexpr const char* kName = "portable";
constexpr int W = 8;
constexpr int kDenseRows = 2;
constexpr int kDenseVectors = 4;

struct F {
  float lane[W];
};
struct I {
  int32_t lane[W];
};

#define QSERVE_LANES for (int i = 0; i < W; ++i)

QSERVE_INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
QSERVE_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
// The exponent is moved by a product with 2^112, which is right for subnormals as well.
QSERVE_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const float scaled = bits_to_float(uint32_t(h & 0x7FFF) << 13) * 0x1p112f;
  const uint32_t special = (h & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u;
  return bits_to_float(float_to_bits(scaled) | special | sign);
}
// Rounds to nearest even: the sum with a power of two 13 bits above the last place drops what half cannot hold.
QSERVE_INLINE uint16_t float_to_half(float x) {
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7FFFFFFF;
  const uint32_t sign = (bits >> 16) & 0x8000;
  if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);
  if (magnitude < 0x38800000) {  // subnormal: a sum with 0.5 puts the last place at 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return uint16_t(sign | (float_to_bits(shifted) - 0x3F000000u));
  }
  const uint32_t rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}
QSERVE_INLINE uint16_t float_to_bfloat(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

#define QSERVE_EACH(expression) \
  F out;                        \
  QSERVE_LANES out.lane[i] = (expression); \
  return out

QSERVE_INLINE F set1(float x) { QSERVE_EACH(x); }
QSERVE_INLINE F zero() { return set1(0.0f); }
QSERVE_INLINE F load(const float* p) { QSERVE_EACH(p[i]); }
QSERVE_INLINE void store(float* p, F a) { QSERVE_LANES p[i] = a.lane[i]; }
QSERVE_INLINE F load_part(const float* p, int n) { QSERVE_EACH(i < n ? p[i] : 0.0f); }
QSERVE_INLINE void store_part(float* p, F a, int n) {
  for (int i = 0; i < n && i < W; ++i) p[i] = a.lane[i];
}
QSERVE_INLINE F add(F a, F b) { QSERVE_EACH(a.lane[i] + b.lane[i]); }
QSERVE_INLINE F sub(F a, F b) { QSERVE_EACH(a.lane[i] - b.lane[i]); }
QSERVE_INLINE F mul(F a, F b) { QSERVE_EACH(a.lane[i] * b.lane[i]); }
QSERVE_INLINE F div(F a, F b) { QSERVE_EACH(a.lane[i] / b.lane[i]); }
QSERVE_INLINE F max(F a, F b) { QSERVE_EACH(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
QSERVE_INLINE F min(F a, F b) { QSERVE_EACH(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
QSERVE_INLINE F fma(F a, F b, F c) { QSERVE_EACH(a.lane[i] * b.lane[i] + c.lane[i]); }
QSERVE_INLINE F fnma(F a, F b, F c) { QSERVE_EACH(c.lane[i] - a.lane[i] * b.lane[i]); }
// Exact for magnitudes below 2^22: the sum with 1.5 * 2^23 has no room for a fraction.
QSERVE_INLINE F round_even(F a) { QSERVE_EACH((a.lane[i] + 12582912.0f) - 12582912.0f); }
QSERVE_INLINE F pow2(F n) { QSERVE_EACH(bits_to_float(uint32_t(int32_t(n.lane[i]) + 127) << 23)); }
QSERVE_INLINE F select_first(int n, F a, F b) { QSERVE_EACH(i < n ? a.lane[i] : b.lane[i]); }

QSERVE_INLINE F load_as(const float* p) { return load(p); }
QSERVE_INLINE F load_as(const Half* p) { QSERVE_EACH(half_to_float(p[i].bits)); }
QSERVE_INLINE F load_as(const Bfloat* p) { QSERVE_EACH(bits_to_float(uint32_t(p[i].bits) << 16)); }
QSERVE_INLINE F load_bytes(const uint8_t* p) { QSERVE_EACH(float(p[i])); }
QSERVE_INLINE void store_as(float* p, F a) { store(p, a); }
QSERVE_INLINE void store_as(Half* p, F a) { QSERVE_LANES p[i].bits = float_to_half(a.lane[i]); }
QSERVE_INLINE void store_as(Bfloat* p, F a) { QSERVE_LANES p[i].bits = float_to_bfloat(a.lane[i]); }

QSERVE_INLINE float add_lanes(F a) {
  const float* x = a.lane;
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}
QSERVE_INLINE float max_lanes(F a) {
  float top = a.lane[0];
  QSERVE_LANES top = a.lane[i] > top ? a.lane[i] : top;
  return top;
}
// Lanes 2i and 2i + 1 added; the sums of a before those of b: after log2(W) joins, the totals in order.
template <int N>
QSERVE_INLINE F join(F a, F b) {
  F out;
  for (int i = 0; i < W / 2; ++i) {
    out.lane[i] = a.lane[2 * i] + a.lane[2 * i + 1];
    out.lane[i + W / 2] = b.lane[2 * i] + b.lane[2 * i + 1];
  }
  return out;
}

QSERVE_INLINE I int_zero() { return I{}; }
QSERVE_INLINE F to_float(I a) { QSERVE_EACH(float(a.lane[i])); }
QSERVE_INLINE I load_lanes(const uint8_t* p) {
  I out;
  QSERVE_LANES {
    const uint8_t* b = p + 4 * i;  // little-endian whatever the machine is
    out.lane[i] = int32_t(uint32_t(b[0]) | uint32_t(b[1]) << 8 | uint32_t(b[2]) << 16 | uint32_t(b[3]) << 24);
  }
  return out;
}
template <int Shift, int Mask>
QSERVE_INLINE F field(I a) {
  QSERVE_EACH(float((uint32_t(a.lane[i]) >> Shift) & Mask));
}

// Rounding to int8: magnitudes are compared as integers, so that a NaN wins and is not lost.
QSERVE_INLINE I magnitude(F a) {
  I out;
  QSERVE_LANES out.lane[i] = int32_t(float_to_bits(a.lane[i]) & 0x7FFFFFFF);
  return out;
}
QSERVE_INLINE I int_max(I a, I b) {
  QSERVE_LANES a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
QSERVE_INLINE I int_add(I a, I b) {
  QSERVE_LANES a.lane[i] += b.lane[i];
  return a;
}
QSERVE_INLINE int32_t int_max_lanes(I a) {
  int32_t top = a.lane[0];
  QSERVE_LANES top = a.lane[i] > top ? a.lane[i] : top;
  return top;
}
QSERVE_INLINE int32_t int_add_lanes(I a) {
  int32_t sum = 0;
  QSERVE_LANES sum += a.lane[i];
  return sum;
}
QSERVE_INLINE I round_int(F a) {
  const F rounded = round_even(a);
  I out;
  QSERVE_LANES {
    const float x = rounded.lane[i];
    out.lane[i] = x >= -128.0f && x <= 127.0f ? int32_t(x) : -128;  // what a NaN becomes
  }
  return out;
}
QSERVE_INLINE void store_int8(int8_t* p, I a) { QSERVE_LANES p[i] = int8_t(a.lane[i]); }

// dot[r] += codes of 32 inputs (4 x 64 bytes, 8 of 16 outputs) * rows [8 quads][R][4].
template <int R>
QSERVE_INLINE void dot_int4(const uint8_t* codes, const int8_t* rows, I (&dot)[R]) {
  for (int v = 0; v < 4; ++v) {
    const uint8_t* lanes = codes + 64 * v;
    for (int r = 0; r < R; ++r) {
      const int8_t* low = rows + 8 * R * v + 4 * r;
      const int8_t* high = low + 4 * R;
      QSERVE_LANES for (int j = 0; j < 4; ++j) {
        const int32_t both = lanes[4 * i + j];
        dot[r].lane[i] += (both & 15) * low[j] + (both >> 4) * high[j];
      }
    }
  }
}

// dot[r] = biased codes of 32 inputs (8 x 64 bytes, 8 of 16 outputs) * rows, without the bias.
template <int R>
QSERVE_INLINE void dot_int8(const uint8_t* codes, const int8_t* rows, const int32_t* offsets, I (&dot)[R]) {
  for (int r = 0; r < R; ++r) QSERVE_LANES dot[r].lane[i] = offsets[r];
  for (int v = 0; v < 8; ++v) {
    const uint8_t* lanes = codes + 64 * v;
    for (int r = 0; r < R; ++r) {
      const int8_t* x = rows + 4 * (R * v + r);
      QSERVE_LANES for (int j = 0; j < 4; ++j) dot[r].lane[i] += int32_t(lanes[4 * i + j]) * x[j];
    }
  }
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
