// Vectors of 16 lanes: AVX-512 F, BW, DQ, VL and VNNI.
#pragma once

#include <immintrin.h>

#include "layout.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

constexpr int W = 16;
constexpr int kDenseRows = 6;  // register tile of the float matmul: rows x vectors of outputs
constexpr int kDenseVectors = 4;
constexpr int kExactSums = 4;  // of a row in the matmul of floats and codes: chains of FMAs side by side
constexpr int kQueryRows = 4;      // query rows that share a converted key or value
constexpr int kColumnVectors = 4;  // vectors of an output row that are summed at a time

using F = __m512;
using I = __m512i;

QSERVE_INLINE F zero() { return _mm512_setzero_ps(); }
QSERVE_INLINE F set1(float x) { return _mm512_set1_ps(x); }
QSERVE_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
QSERVE_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
QSERVE_INLINE __mmask16 first_lanes(int n) { return n >= 16 ? 0xFFFF : __mmask16((1u << n) - 1); }
QSERVE_INLINE F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
QSERVE_INLINE void store_part(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }

QSERVE_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
QSERVE_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
QSERVE_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
QSERVE_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
QSERVE_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
QSERVE_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
QSERVE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
QSERVE_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
QSERVE_INLINE F round_even(F a) { return _mm512_roundscale_ps(a, 0); }
QSERVE_INLINE F pow2(F n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
// Where n lanes from the first: a; elsewhere b.
QSERVE_INLINE F select_first(int n, F a, F b) { return _mm512_mask_blend_ps(first_lanes(n), b, a); }

QSERVE_INLINE F load_as(const float* p) { return load(p); }
QSERVE_INLINE F load_as(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
QSERVE_INLINE F load_as(const Bfloat* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
QSERVE_INLINE F load_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
QSERVE_INLINE void store_as(float* p, F a) { store(p, a); }
QSERVE_INLINE void store_as(Half* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
QSERVE_INLINE void store_as(Bfloat* p, F a) {
  const I bits = _mm512_castps_si512(a);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const I even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const I rounded = _mm512_mask_mov_epi32(even, nan, _mm512_set1_epi32(0x7FC00000));
  const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
}

QSERVE_INLINE float add_lanes(F a) { return _mm512_reduce_add_ps(a); }
QSERVE_INLINE float max_lanes(F a) { return _mm512_reduce_max_ps(a); }

// Four vectors of 16 partial sums become one with the four totals of each 128-bit lane, and so on: tokens stay in order.
QSERVE_INLINE F join_1(F a, F b) { return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
QSERVE_INLINE F join_2(F a, F b) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
QSERVE_INLINE F join_wide(F a, F b) {
  return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
template <int N>
QSERVE_INLINE F join(F a, F b) {
  if constexpr (N == 1) return join_1(a, b);
  if constexpr (N == 2) return join_2(a, b);
  return join_wide(a, b);
}

QSERVE_INLINE I int_zero() { return _mm512_setzero_si512(); }
QSERVE_INLINE I int_set1(int32_t x) { return _mm512_set1_epi32(x); }
QSERVE_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
constexpr int kByteProducts = 64;  // of multiply_add_bytes: the fastest products of bytes, as the machine probe measures them
QSERVE_INLINE I multiply_add_bytes(I a, I b, I sum) { return _mm512_dpbusd_epi32(sum, a, b); }
QSERVE_INLINE I load_lanes(const uint8_t* p) { return _mm512_loadu_si512(p); }

// Bytes: (a >> Shift) & Mask in each; a negative shift goes left.
template <int Shift, int Mask>
QSERVE_INLINE I byte_field(I a) {
  if constexpr (Shift > 0) a = _mm512_srli_epi16(a, Shift);
  if constexpr (Shift < 0) a = _mm512_slli_epi16(a, -Shift);
  return _mm512_and_si512(a, _mm512_set1_epi8(Mask));
}
QSERVE_INLINE I bytes_or(I a, I b) { return _mm512_or_si512(a, b); }

// Byte J of each lane as a float: an unsigned integer, or float8 e4m3 (its bits moved to those of a float, whose exponent is then
// 120 too low; NaN is not known).
template <int J>
QSERVE_INLINE F byte_value(I a) {
  if constexpr (J > 0) a = _mm512_srli_epi32(a, 8 * J);
  if constexpr (J < 3) a = _mm512_and_si512(a, _mm512_set1_epi32(255));
  return _mm512_cvtepi32_ps(a);
}
template <int J>
QSERVE_INLINE F float8_value(I a) {
  if constexpr (J < 3) a = _mm512_slli_epi32(a, 24 - 8 * J);
  const I bits = _mm512_and_si512(_mm512_srai_epi32(a, 4), _mm512_set1_epi32(0x87F00000));
  return mul(_mm512_castsi512_ps(bits), set1(0x1p120f));
}

// Tables of 16, and what lies in them at places given by bytes 0..15.
class ByteTable {
 public:
  QSERVE_INLINE_METHOD explicit ByteTable(const uint8_t* p)
      : bytes_(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) {}
  QSERVE_INLINE_METHOD I find(I places) const { return _mm512_shuffle_epi8(bytes_, places); }

 private:
  I bytes_;
};
class FloatTable {
 public:
  QSERVE_INLINE_METHOD explicit FloatTable(const float* p) : floats_(load(p)) {}
  template <int J>
  QSERVE_INLINE_METHOD F find(I places) const {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(places, 8 * J), floats_);
  }

 private:
  F floats_;
};

// Rounding to int8: magnitudes are compared as integers, so that a NaN wins and is not lost.
QSERVE_INLINE I magnitude(F a) {
  return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7FFFFFFF));
}
QSERVE_INLINE I int_max(I a, I b) { return _mm512_max_epi32(a, b); }
QSERVE_INLINE I int_add(I a, I b) { return _mm512_add_epi32(a, b); }
QSERVE_INLINE F exponent(F a) {  // the power of two at or below a positive number
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7F800000)));
}
QSERVE_INLINE int32_t int_max_lanes(I a) { return _mm512_reduce_max_epi32(a); }
QSERVE_INLINE int32_t int_add_lanes(I a) { return _mm512_reduce_add_epi32(a); }
QSERVE_INLINE I round_int(F a) { return _mm512_cvtps_epi32(a); }
QSERVE_INLINE void store_int8(int8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a));
}

QSERVE_INLINE I quad(const int8_t* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, 4);
  return _mm512_set1_epi32(bits);
}

// The integer product of 32 inputs x 16 outputs with R rows, quad by quad: rows are [8 quads][R][4]. SmallDot takes codes of up
// to 4 bits. ByteDot takes bytes biased by 128; offsets are -128 times the sum of each row, which takes the bias off.
template <int R, bool Biased>
class Dot {
 public:
  QSERVE_INLINE_METHOD explicit Dot(const int32_t* offsets) {
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { dot_[r] = Biased ? int_set1(offsets[r]) : int_zero(); });
  }
  template <int Q>
  QSERVE_INLINE_METHOD void add(Index<Q>, I codes, const int8_t* rows) {
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
      dot_[r] = _mm512_dpbusd_epi32(dot_[r], codes, quad(rows + 4 * (R * Q + r)));
    });
  }
  template <int Row>
  QSERVE_INLINE_METHOD I total(Index<Row>) const {
    return dot_[Row];
  }

 private:
  I dot_[R];
};
template <int R>
using SmallDot = Dot<R, false>;
template <int R>
using ByteDot = Dot<R, true>;

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
