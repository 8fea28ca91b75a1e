// Vectors of 8 lanes: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "layout.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

constexpr int W = 8;
constexpr int kDenseRows = 3;
constexpr int kDenseVectors = 4;
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
template <int Shift, int Mask>
QSERVE_INLINE F field(I a) {
  return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(a, Shift), _mm256_set1_epi32(Mask)));
}

// Rounding to int8: magnitudes are compared as integers, so that a NaN wins and is not lost.
QSERVE_INLINE I magnitude(F a) {
  return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7FFFFFFF));
}
QSERVE_INLINE I int_max(I a, I b) { return _mm256_max_epi32(a, b); }
QSERVE_INLINE I int_add(I a, I b) { return _mm256_add_epi32(a, b); }
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

// dot[r] += codes of 32 inputs (4 x 64 bytes, 8 of 16 outputs) * rows [8 quads][R][4].
// A pair of products is at most 2 * 15 * 127, so the 8 pairs of 32 inputs fit 16 bits: 30480 < 32768.
template <int R>
QSERVE_INLINE void dot_int4(const uint8_t* codes, const int8_t* rows, I (&dot)[R]) {
  const I low_mask = _mm256_set1_epi8(15);
  I pairs[R];
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA { pairs[r] = int_zero(); });
  each<4>([&](auto v) QSERVE_INLINE_LAMBDA {
    const I both = load_lanes(codes + 64 * v);
    const I low = _mm256_and_si256(both, low_mask);
    const I high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_mask);
    const int8_t* x = rows + 8 * R * v;
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
      pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(low, quad(x + 4 * r)));
    });
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
      pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(high, quad(x + 4 * (R + r))));
    });
  });
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
    dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(pairs[r], _mm256_set1_epi16(1)));
  });
}

// dot[r] = codes of 32 inputs (8 x 64 bytes, 8 of 16 outputs) * rows. The bias comes off first: |w| * sign(w) x stays
// within 16 bits (2 * 127 * 127), where unsigned w * x would saturate.
template <int R>
QSERVE_INLINE void dot_int8(const uint8_t* codes, const int8_t* rows, const int32_t*, I (&dot)[R]) {
  const I bias = _mm256_set1_epi8(-128);
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA { dot[r] = int_zero(); });
  each<8>([&](auto v) QSERVE_INLINE_LAMBDA {
    const I weights = _mm256_xor_si256(load_lanes(codes + 64 * v), bias);
    const I magnitudes = _mm256_abs_epi8(weights);
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
      const I x = _mm256_sign_epi8(quad(rows + 4 * (R * v + r)), weights);
      const I pairs = _mm256_maddubs_epi16(magnitudes, x);
      dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    });
  });
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
