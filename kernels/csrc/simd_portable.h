// Vectors of 16 lanes as four of 4, in the vector types that GCC and Clang have for every machine (SSE2, NEON, ...).
#pragma once

#include "layout.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "codes are read four at a time, the first in the low byte");

constexpr int W = 16;
constexpr int kDenseRows = 2;
constexpr int kDenseVectors = 1;
constexpr int kQueryRows = 2;
constexpr int kColumnVectors = 1;

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));
using Uint4 = uint32_t __attribute__((vector_size(16)));
using Short8 = int16_t __attribute__((vector_size(16)));
using Ushort4 = uint16_t __attribute__((vector_size(8)));
using Ushort8 = uint16_t __attribute__((vector_size(16)));

struct F {
  Float4 part[4];
};
struct I {
  Int4 part[4];
};

template <typename To, typename From>
QSERVE_INLINE To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <typename T>
QSERVE_INLINE T load_bits(const void* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

// One expression for each of the four parts of a vector; p is the number of the part.
#define QSERVE_PARTS(Type, expression) \
  Type out;                            \
  each<4>([&](auto p) QSERVE_INLINE_LAMBDA { out.part[p] = (expression); }); \
  return out

QSERVE_INLINE F set1(float x) { QSERVE_PARTS(F, (Float4{x, x, x, x})); }
QSERVE_INLINE F zero() { return set1(0.0f); }
QSERVE_INLINE F load(const float* x) { QSERVE_PARTS(F, load_bits<Float4>(x + 4 * p)); }
QSERVE_INLINE void store(float* x, F a) { __builtin_memcpy(x, a.part, sizeof a); }
QSERVE_INLINE F load_part(const float* x, int n) {
  if (n >= W) return load(x);
  F out = zero();
  __builtin_memcpy(out.part, x, n * sizeof(float));
  return out;
}
QSERVE_INLINE void store_part(float* x, F a, int n) { __builtin_memcpy(x, a.part, (n < W ? n : W) * sizeof(float)); }

QSERVE_INLINE F add(F a, F b) { QSERVE_PARTS(F, a.part[p] + b.part[p]); }
QSERVE_INLINE F sub(F a, F b) { QSERVE_PARTS(F, a.part[p] - b.part[p]); }
QSERVE_INLINE F mul(F a, F b) { QSERVE_PARTS(F, a.part[p] * b.part[p]); }
QSERVE_INLINE F div(F a, F b) { QSERVE_PARTS(F, a.part[p] / b.part[p]); }
QSERVE_INLINE F max(F a, F b) { QSERVE_PARTS(F, a.part[p] > b.part[p] ? a.part[p] : b.part[p]); }
QSERVE_INLINE F min(F a, F b) { QSERVE_PARTS(F, a.part[p] < b.part[p] ? a.part[p] : b.part[p]); }
QSERVE_INLINE F fma(F a, F b, F c) { QSERVE_PARTS(F, a.part[p] * b.part[p] + c.part[p]); }
QSERVE_INLINE F fnma(F a, F b, F c) { QSERVE_PARTS(F, c.part[p] - a.part[p] * b.part[p]); }
// Exact for magnitudes below 2^22: the sum with 1.5 * 2^23 has no room for a fraction.
QSERVE_INLINE F round_even(F a) { QSERVE_PARTS(F, (a.part[p] + 12582912.0f) - 12582912.0f); }
QSERVE_INLINE F pow2(F n) {  // n in -126..127
  QSERVE_PARTS(F, bit_copy<Float4>((__builtin_convertvector(n.part[p], Int4) + 127) << 23));
}
// Where n lanes from the first: a; elsewhere b.
QSERVE_INLINE F select_first(int n, F a, F b) {
  const Int4 lanes = {0, 1, 2, 3};
  QSERVE_PARTS(F, lanes + 4 * p < n ? a.part[p] : b.part[p]);
}

// The exponent is moved by a product with 2^112, which is right for subnormals as well.
QSERVE_INLINE Float4 widen(Uint4 half) {
  const Uint4 special = (half & 0x7C00) == 0x7C00 ? Uint4{} + 0x7F800000u : Uint4{};
  const Float4 scaled = bit_copy<Float4>((half & 0x7FFF) << 13) * 0x1p112f;
  return bit_copy<Float4>(bit_copy<Uint4>(scaled) | special | (half & 0x8000) << 16);
}
// To nearest even. A subnormal is rounded by a sum with 0.5, whose last place is 2^-24, the last place of a subnormal half.
QSERVE_INLINE Uint4 narrow(Float4 x) {
  const Uint4 bits = bit_copy<Uint4>(x), magnitude = bits & 0x7FFFFFFF;
  const Uint4 normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  const Uint4 small = bit_copy<Uint4>(bit_copy<Float4>(magnitude) + 0.5f) - 0x3F000000u;
  Uint4 out = magnitude < 0x38800000u ? small : normal;
  out = magnitude >= 0x477FF000u ? Uint4{} + 0x7C00u : out;
  out = magnitude > 0x7F800000u ? Uint4{} + 0x7E00u : out;
  return out | (bits >> 16 & 0x8000);
}
QSERVE_INLINE Uint4 narrow_bfloat(Float4 x) {
  const Uint4 bits = bit_copy<Uint4>(x);
  const Uint4 rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7FFFFFFF) > 0x7F800000u ? Uint4{} + 0x7FC0u : rounded;
}
QSERVE_INLINE Uint4 load_words(const uint16_t* p) { return __builtin_convertvector(load_bits<Ushort4>(p), Uint4); }
QSERVE_INLINE void store_words(uint16_t* p, Uint4 a) {
  const Ushort4 words = __builtin_convertvector(a, Ushort4);
  __builtin_memcpy(p, &words, sizeof words);
}

QSERVE_INLINE F load_as(const float* x) { return load(x); }
QSERVE_INLINE F load_as(const Half* x) { QSERVE_PARTS(F, widen(load_words(&x->bits + 4 * p))); }
QSERVE_INLINE F load_as(const Bfloat* x) { QSERVE_PARTS(F, bit_copy<Float4>(load_words(&x->bits + 4 * p) << 16)); }
QSERVE_INLINE F load_bytes(const uint8_t* x) {
  QSERVE_PARTS(F, (Float4{float(x[4 * p]), float(x[4 * p + 1]), float(x[4 * p + 2]), float(x[4 * p + 3])}));
}
QSERVE_INLINE void store_as(float* x, F a) { store(x, a); }
QSERVE_INLINE void store_as(Half* x, F a) {
  each<4>([&](auto p) QSERVE_INLINE_LAMBDA { store_words(&x->bits + 4 * p, narrow(a.part[p])); });
}
QSERVE_INLINE void store_as(Bfloat* x, F a) {
  each<4>([&](auto p) QSERVE_INLINE_LAMBDA { store_words(&x->bits + 4 * p, narrow_bfloat(a.part[p])); });
}

QSERVE_INLINE float add_lanes(F a) {
  const Float4 sum = (a.part[0] + a.part[1]) + (a.part[2] + a.part[3]);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
QSERVE_INLINE float max_lanes(F a) {
  float top = a.part[0][0];
  for (const Float4& part : a.part)
    for (int i = 0; i < 4; ++i) top = part[i] > top ? part[i] : top;
  return top;
}
QSERVE_INLINE Float4 add_neighbours(Float4 a, Float4 b) {
  const Float4 even = {a[0], a[2], b[0], b[2]}, odd = {a[1], a[3], b[1], b[3]};
  return even + odd;
}
// Lanes 2i and 2i + 1 added, the sums of a before those of b: after four joins, sixteen totals in order.
template <int N>
QSERVE_INLINE F join(F a, F b) {
  return {add_neighbours(a.part[0], a.part[1]), add_neighbours(a.part[2], a.part[3]),
          add_neighbours(b.part[0], b.part[1]), add_neighbours(b.part[2], b.part[3])};
}

QSERVE_INLINE I int_set1(int32_t x) { QSERVE_PARTS(I, (Int4{x, x, x, x})); }
QSERVE_INLINE I int_zero() { return int_set1(0); }
QSERVE_INLINE F to_float(I a) { QSERVE_PARTS(F, __builtin_convertvector(a.part[p], Float4)); }
constexpr int kByteProducts = 32;  // of multiply_add_bytes: the fastest products of bytes, as the machine probe measures them
QSERVE_INLINE I multiply_add_bytes(I a, I b, I sum) {
  QSERVE_PARTS(I, bit_copy<Int4>(bit_copy<Ushort8>(a.part[p]) * bit_copy<Ushort8>(b.part[p]) + bit_copy<Ushort8>(sum.part[p])));
}
QSERVE_INLINE I load_lanes(const uint8_t* x) { QSERVE_PARTS(I, load_bits<Int4>(x + 16 * p)); }
template <int Shift, int Mask>
QSERVE_INLINE F field(I a) {
  QSERVE_PARTS(F, __builtin_convertvector((a.part[p] >> Shift) & Mask, Float4));
}

// Rounding to int8: magnitudes are compared as integers, so that a NaN wins and is not lost.
QSERVE_INLINE I magnitude(F a) { QSERVE_PARTS(I, bit_copy<Int4>(a.part[p]) & 0x7FFFFFFF); }
QSERVE_INLINE I int_max(I a, I b) { QSERVE_PARTS(I, a.part[p] > b.part[p] ? a.part[p] : b.part[p]); }
QSERVE_INLINE I int_add(I a, I b) { QSERVE_PARTS(I, a.part[p] + b.part[p]); }
QSERVE_INLINE int32_t int_max_lanes(I a) {
  int32_t top = a.part[0][0];
  for (const Int4& part : a.part)
    for (int i = 0; i < 4; ++i) top = part[i] > top ? part[i] : top;
  return top;
}
QSERVE_INLINE int32_t int_add_lanes(I a) {
  const Int4 sum = (a.part[0] + a.part[1]) + (a.part[2] + a.part[3]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
// The low bits of x + 1.5 * 2^23 are x rounded to nearest even, for every x that a code can come from.
QSERVE_INLINE I round_int(F a) { QSERVE_PARTS(I, bit_copy<Int4>(a.part[p] + 12582912.0f) - 0x4B400000); }
QSERVE_INLINE void store_int8(int8_t* x, I a) {
  each<16>([&](auto i) QSERVE_INLINE_LAMBDA { x[i] = int8_t(a.part[i / 4][int(i % 4)]); });
}

// Inputs 0 and 2, or 1 and 3, of a quad: for each pair of 16-bit halves of a lane.
QSERVE_INLINE Short8 spread(int16_t first, int16_t second) {
  return Short8{first, second, first, second, first, second, first, second};
}

// Sums of codes times inputs in 16 bits, two for each output: 32 products of at most 15 * 127 make 2 sums of 30480.
struct PairSums {
  Short8 part[4];
};

// Nibble codes of a quad of inputs, at bits `Shift` and 8 + `Shift` of every 16.
template <int Shift>
QSERVE_INLINE void add_quad(const uint8_t* codes, const int8_t* x, PairSums& sums) {
  const Short8 even = spread(x[0], x[2]), odd = spread(x[1], x[3]);
  each<4>([&](auto p) QSERVE_INLINE_LAMBDA {
    const Ushort8 both = load_bits<Ushort8>(codes + 16 * p);
    const Short8 first = bit_copy<Short8>((both >> Shift) & 15), second = bit_copy<Short8>((both >> (8 + Shift)) & 15);
    sums.part[p] += first * even + second * odd;
  });
}

QSERVE_INLINE I total(const PairSums& sums) {
  QSERVE_PARTS(I, (bit_copy<Int4>(sums.part[p]) << 16 >> 16) + (bit_copy<Int4>(sums.part[p]) >> 16));
}

// dot[r] += codes of 32 inputs (4 x 64 bytes, 16 outputs) * rows [8 quads][R][4].
template <int R>
QSERVE_INLINE void dot_int4(const uint8_t* codes, const int8_t* rows, I (&dot)[R]) {
  for (int r = 0; r < R; ++r) {
    PairSums sums{};
    for (int v = 0; v < 4; ++v) {
      add_quad<0>(codes + 64 * v, rows + 4 * (2 * R * v + r), sums);
      add_quad<4>(codes + 64 * v, rows + 4 * (2 * R * v + R + r), sums);
    }
    dot[r] = int_add(dot[r], total(sums));
  }
}

// dot[r] = biased codes of 32 inputs (8 x 64 bytes) * rows, without the bias: two products with nibbles.
template <int R>
QSERVE_INLINE void dot_int8(const uint8_t* codes, const int8_t* rows, const int32_t* offsets, I (&dot)[R]) {
  for (int r = 0; r < R; ++r) {
    PairSums low{}, high{};
    for (int v = 0; v < 8; ++v) {
      add_quad<0>(codes + 64 * v, rows + 4 * (R * v + r), low);
      add_quad<4>(codes + 64 * v, rows + 4 * (R * v + r), high);
    }
    const I low_total = total(low), high_total = total(high);
    each<4>([&](auto p) QSERVE_INLINE_LAMBDA {
      dot[r].part[p] = low_total.part[p] + (high_total.part[p] << 4) + offsets[r];
    });
  }
}

#undef QSERVE_PARTS

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
