// Vectors of 16 lanes as four of 4, in the vector types that GCC and Clang have for every machine (SSE2, NEON, ...).
#pragma once

#include "layout.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "codes are read four at a time, the first in the low byte");

constexpr int W = 16;
constexpr int kDenseRows = 2;
constexpr int kDenseVectors = 1;
constexpr int kExactSums = 2;  // of a row in the matmul of floats and codes: chains of FMAs side by side
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

// Bytes: (a >> Shift) & Mask in each; a negative shift goes left.
template <int Shift, int Mask>
QSERVE_INLINE I byte_field(I a) {
  constexpr int32_t mask = Mask * 0x01010101;
  if constexpr (Shift >= 0) {
    QSERVE_PARTS(I, (a.part[p] >> Shift) & mask);
  } else {
    QSERVE_PARTS(I, (a.part[p] << -Shift) & mask);
  }
}
QSERVE_INLINE I bytes_or(I a, I b) { QSERVE_PARTS(I, a.part[p] | b.part[p]); }

// Byte J of each lane as a float: an unsigned integer, or float8 e4m3 (its bits moved to those of a float, whose exponent is then
// 120 too low; NaN is not known).
template <int J>
QSERVE_INLINE F byte_value(I a) {
  QSERVE_PARTS(F, __builtin_convertvector((a.part[p] >> 8 * J) & 255, Float4));
}
template <int J>
QSERVE_INLINE F float8_value(I a) {
  QSERVE_PARTS(F, bit_copy<Float4>(((a.part[p] << (24 - 8 * J)) >> 4) & int32_t(0x87F00000)) * 0x1p120f);
}

// Tables of 16, and what lies in them at places given by bytes 0..15.
class ByteTable {
 public:
  QSERVE_INLINE_METHOD explicit ByteTable(const uint8_t* p) : bytes_(p) {}
  QSERVE_INLINE_METHOD I find(I places) const {
    uint8_t found[sizeof(I)];
    __builtin_memcpy(found, places.part, sizeof found);
    for (uint8_t& byte : found) byte = bytes_[byte];
    return load_lanes(found);
  }

 private:
  const uint8_t* bytes_;
};
class FloatTable {
 public:
  QSERVE_INLINE_METHOD explicit FloatTable(const float* p) : floats_(p) {}
  template <int J>
  QSERVE_INLINE_METHOD F find(I places) const {
    float found[W];
    for (int i = 0; i < W; ++i) found[i] = floats_[places.part[i / 4][i % 4] >> 8 * J & 15];
    return load(found);
  }

 private:
  const float* floats_;
};

// Rounding to int8: magnitudes are compared as integers, so that a NaN wins and is not lost.
QSERVE_INLINE I magnitude(F a) { QSERVE_PARTS(I, bit_copy<Int4>(a.part[p]) & 0x7FFFFFFF); }
QSERVE_INLINE I int_max(I a, I b) { QSERVE_PARTS(I, a.part[p] > b.part[p] ? a.part[p] : b.part[p]); }
QSERVE_INLINE I int_add(I a, I b) { QSERVE_PARTS(I, a.part[p] + b.part[p]); }
QSERVE_INLINE F exponent(F a) {  // the power of two at or below a positive number
  QSERVE_PARTS(F, bit_copy<Float4>(bit_copy<Int4>(a.part[p]) & 0x7F800000));
}
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

// The four bits from `Shift` on of the codes of a quad of inputs.
template <int Shift>
QSERVE_INLINE void add_quad(const I& codes, const int8_t* x, PairSums& sums) {
  const Short8 even = spread(x[0], x[2]), odd = spread(x[1], x[3]);
  each<4>([&](auto p) QSERVE_INLINE_LAMBDA {
    const Ushort8 both = bit_copy<Ushort8>(codes.part[p]);
    const Short8 first = bit_copy<Short8>((both >> Shift) & 15), second = bit_copy<Short8>((both >> (8 + Shift)) & 15);
    sums.part[p] += first * even + second * odd;
  });
}

QSERVE_INLINE I total_of_pairs(const PairSums& sums) {
  QSERVE_PARTS(I, (bit_copy<Int4>(sums.part[p]) << 16 >> 16) + (bit_copy<Int4>(sums.part[p]) >> 16));
}

// The integer product of 32 inputs x 16 outputs with R rows: rows are [8 quads][R][4]. It is put off until all quads are there:
// the sums of one row fill the registers.
template <int R>
class QuadCodes {
 public:
  template <int Q>
  QSERVE_INLINE_METHOD void add(Index<Q>, I codes, const int8_t* rows) {
    codes_[Q] = codes;
    rows_ = rows;
  }

 protected:
  template <int Shift>
  QSERVE_INLINE_METHOD I total_of(int row) const {
    PairSums sums{};
    for (int q = 0; q < 8; ++q) add_quad<Shift>(codes_[q], rows_ + 4 * (R * q + row), sums);
    return total_of_pairs(sums);
  }

 private:
  I codes_[8];
  const int8_t* rows_;
};

// Codes of up to 4 bits.
template <int R>
class SmallDot : public QuadCodes<R> {
 public:
  QSERVE_INLINE_METHOD explicit SmallDot(const int32_t*) {}
  QSERVE_INLINE_METHOD I total(int row) const { return this->template total_of<0>(row); }
};

// Bytes biased by 128, as two products with nibbles; offsets are -128 times the sum of each row, which takes the bias off.
template <int R>
class ByteDot : public QuadCodes<R> {
 public:
  QSERVE_INLINE_METHOD explicit ByteDot(const int32_t* offsets) : offsets_(offsets) {}
  QSERVE_INLINE_METHOD I total(int row) const {
    const I low = this->template total_of<0>(row), high = this->template total_of<4>(row);
    QSERVE_PARTS(I, low.part[p] + (high.part[p] << 4) + offsets_[row]);
  }

 private:
  const int32_t* offsets_;
};

#undef QSERVE_PARTS

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
