// Vectors of 8 lanes: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "layout.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

constexpr int W = 8;
constexpr int kDenseRows = 3;
constexpr int kDenseVectors = 4;
constexpr int kExactSums = 2;  // of a row in the matmul of floats and codes: chains of FMAs side by side
constexpr int kQueryRows = 2;
constexpr int kColumnVectors = 4;

using F = __m256;
using I = __m256i;

QSERVE_INLINE F zero() { return _mm256_setzero_ps(); }
QSERVE_INLINE F set1(float x) { return _mm256_set1_ps(x); }
QSERVE_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
QSERVE_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
QSERVE_INLINE I first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
QSERVE_INLINE F load_part(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
QSERVE_INLINE void store_part(float* p, F a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a); }

QSERVE_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
QSERVE_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
QSERVE_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
QSERVE_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
QSERVE_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
QSERVE_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
QSERVE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
QSERVE_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
QSERVE_INLINE F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
QSERVE_INLINE F pow2(F n) {  // n in -126..127
  const I biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
// Where n lanes from the first: a; elsewhere b.
QSERVE_INLINE F select_first(int n, F a, F b) {
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first_lanes(n)));
}

QSERVE_INLINE F load_as(const float* p) { return load(p); }
QSERVE_INLINE F load_as(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
QSERVE_INLINE F load_as(const Bfloat* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
QSERVE_INLINE F load_bytes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
QSERVE_INLINE void store_as(float* p, F a) { store(p, a); }
QSERVE_INLINE void store_as(Half* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
QSERVE_INLINE void store_as(Bfloat* p, F a) {
  const I bits = _mm256_castps_si256(a);
  const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const I even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const I nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const I rounded = _mm256_srli_epi32(_mm256_blendv_epi8(even, _mm256_set1_epi32(0x7FC00000), nan), 16);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
}

QSERVE_INLINE float add_lanes(F a) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
QSERVE_INLINE float max_lanes(F a) {
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}

// Sums of the lanes of several vectors, pair by pair: tokens stay in order.
template <int N>
QSERVE_INLINE F join(F a, F b) {
  if constexpr (N == 1) return add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  if constexpr (N == 2) {
    const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
    return add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  }
  return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

QSERVE_INLINE I int_zero() { return _mm256_setzero_si256(); }
QSERVE_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
constexpr int kByteProducts = 32;  // of multiply_add_bytes: the fastest products of bytes, as the machine probe measures them
QSERVE_INLINE I multiply_add_bytes(I a, I b, I sum) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b)); }
QSERVE_INLINE I load_lanes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// Bytes: (a >> Shift) & Mask in each; a negative shift goes left.
template <int Shift, int Mask>
QSERVE_INLINE I byte_field(I a) {
  if constexpr (Shift > 0) a = _mm256_srli_epi16(a, Shift);
  if constexpr (Shift < 0) a = _mm256_slli_epi16(a, -Shift);
  return _mm256_and_si256(a, _mm256_set1_epi8(Mask));
}
QSERVE_INLINE I bytes_or(I a, I b) { return _mm256_or_si256(a, b); }

// Byte J of each lane as a float: an unsigned integer, or float8 e4m3 (its bits moved to those of a float, whose exponent is then
// 120 too low; NaN is not known).
template <int J>
QSERVE_INLINE F byte_value(I a) {
  if constexpr (J > 0) a = _mm256_srli_epi32(a, 8 * J);
  if constexpr (J < 3) a = _mm256_and_si256(a, _mm256_set1_epi32(255));
  return _mm256_cvtepi32_ps(a);
}
template <int J>
QSERVE_INLINE F float8_value(I a) {
  if constexpr (J < 3) a = _mm256_slli_epi32(a, 24 - 8 * J);
  const I bits = _mm256_and_si256(_mm256_srai_epi32(a, 4), _mm256_set1_epi32(0x87F00000));
  return mul(_mm256_castsi256_ps(bits), set1(0x1p120f));
}

// Tables of 16, and what lies in them at places given by bytes 0..15.
class ByteTable {
 public:
  QSERVE_INLINE_METHOD explicit ByteTable(const uint8_t* p)
      : bytes_(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) {}
  QSERVE_INLINE_METHOD I find(I places) const { return _mm256_shuffle_epi8(bytes_, places); }

 private:
  I bytes_;
};
class FloatTable {
 public:
  QSERVE_INLINE_METHOD explicit FloatTable(const float* p) : low_(load(p)), high_(load(p + 8)) {}
  template <int J>
  QSERVE_INLINE_METHOD F find(I places) const {
    const I place = _mm256_srli_epi32(places, 8 * J);  // its three lowest bits choose, the fourth comes to the sign
    const F low = _mm256_permutevar8x32_ps(low_, place), high = _mm256_permutevar8x32_ps(high_, place);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(places, 28 - 8 * J)));
  }

 private:
  F low_, high_;
};

// Rounding to int8: magnitudes are compared as integers, so that a NaN wins and is not lost.
QSERVE_INLINE I magnitude(F a) {
  return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7FFFFFFF));
}
QSERVE_INLINE I int_max(I a, I b) { return _mm256_max_epi32(a, b); }
QSERVE_INLINE I int_add(I a, I b) { return _mm256_add_epi32(a, b); }
QSERVE_INLINE F exponent(F a) {  // the power of two at or below a positive number
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7F800000)));
}
QSERVE_INLINE int32_t int_max_lanes(I a) {
  __m128i top = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(top, _mm_shuffle_epi32(top, 0xB1)));
}
QSERVE_INLINE int32_t int_add_lanes(I a) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}
QSERVE_INLINE I round_int(F a) { return _mm256_cvtps_epi32(a); }
QSERVE_INLINE void store_int8(int8_t* p, I a) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

QSERVE_INLINE I quad(const int8_t* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, 4);
  return _mm256_set1_epi32(bits);
}

// The integer product of 32 inputs x 8 outputs with R rows, quad by quad: rows are [8 quads][R][4].
// Codes of up to 4 bits: a pair of products is at most 2 * 15 * 127, so the 8 pairs of 32 inputs fit 16 bits: 30480 < 32768.
template <int R>
class SmallDot {
 public:
  QSERVE_INLINE_METHOD explicit SmallDot(const int32_t*) {
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { pairs_[r] = int_zero(); });
  }
  template <int Q>
  QSERVE_INLINE_METHOD void add(Index<Q>, I codes, const int8_t* rows) {
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
      pairs_[r] = _mm256_add_epi16(pairs_[r], _mm256_maddubs_epi16(codes, quad(rows + 4 * (R * Q + r))));
    });
  }
  template <int Row>
  QSERVE_INLINE_METHOD I total(Index<Row>) const {
    return _mm256_madd_epi16(pairs_[Row], _mm256_set1_epi16(1));
  }

 private:
  I pairs_[R];
};

// Bytes biased by 128. The bias comes off first: |w| * sign(w) x stays within 16 bits (2 * 128 * 127), where unsigned w * x would
// saturate.
template <int R>
class ByteDot {
 public:
  QSERVE_INLINE_METHOD explicit ByteDot(const int32_t*) {
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { dot_[r] = int_zero(); });
  }
  template <int Q>
  QSERVE_INLINE_METHOD void add(Index<Q>, I codes, const int8_t* rows) {
    const I weights = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    const I magnitudes = _mm256_abs_epi8(weights);
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
      const I x = _mm256_sign_epi8(quad(rows + 4 * (R * Q + r)), weights);
      const I pairs = _mm256_maddubs_epi16(magnitudes, x);
      dot_[r] = _mm256_add_epi32(dot_[r], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    });
  }
  template <int Row>
  QSERVE_INLINE_METHOD I total(Index<Row>) const {
    return dot_[Row];
  }

 private:
  I dot_[R];
};

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
