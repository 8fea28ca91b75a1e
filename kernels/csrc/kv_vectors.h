// The elements of a cached row as vectors of floats, and the exchange of lanes that a Hadamard transform needs.
#pragma once

#include "simd.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

struct Float8 {  // e4m3; read 2^-8 times too small, which the row's scale makes good
  uint8_t bits;
};
struct Int8 {
  int8_t code;
};
struct Nibbles {  // elements j (low) and j + width / 2 (high) of a row
  uint8_t codes;
};

constexpr float kFloat8Unit = 256.0f;

#if defined(__AVX512VNNI__)

QSERVE_INLINE __m128i load_16_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

QSERVE_INLINE F load_as(const Int8* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16_bytes(p))); }
// The bits of a float8 are those of a float16 with a shorter exponent, whose bias is 8 less.
QSERVE_INLINE F load_as(const Float8* p) {
  const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load_16_bytes(p)), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16(int16_t(0xBF80))));
}
QSERVE_INLINE void load_nibbles(const Nibbles* p, F& low, F& high) {
  const I bytes = _mm512_cvtepu8_epi32(load_16_bytes(p));
  low = _mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(15)));
  high = _mm512_cvtepi32_ps(_mm512_srli_epi32(bytes, 4));
}

// Lane i becomes lane i ^ Distance.
template <int Distance>
QSERVE_INLINE F exchange(F a) {
  if constexpr (Distance == 1) return _mm512_permute_ps(a, 0xB1);
  if constexpr (Distance == 2) return _mm512_permute_ps(a, 0x4E);
  if constexpr (Distance == 4) return _mm512_shuffle_f32x4(a, a, 0xB1);
  return _mm512_shuffle_f32x4(a, a, 0x4E);
}

#elif defined(__AVX2__)

QSERVE_INLINE __m128i load_8_bytes(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

QSERVE_INLINE F load_as(const Int8* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_8_bytes(p))); }
// The bits of a float8 are those of a float16 with a shorter exponent, whose bias is 8 less.
QSERVE_INLINE F load_as(const Float8* p) {
  const __m128i words = _mm_slli_epi16(_mm_cvtepi8_epi16(load_8_bytes(p)), 7);
  return _mm256_cvtph_ps(_mm_and_si128(words, _mm_set1_epi16(int16_t(0xBF80))));
}
QSERVE_INLINE void load_nibbles(const Nibbles* p, F& low, F& high) {
  const I bytes = _mm256_cvtepu8_epi32(load_8_bytes(p));
  low = _mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(15)));
  high = _mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 4));
}

// Lane i becomes lane i ^ Distance.
template <int Distance>
QSERVE_INLINE F exchange(F a) {
  if constexpr (Distance == 1) return _mm256_permute_ps(a, 0xB1);
  if constexpr (Distance == 2) return _mm256_permute_ps(a, 0x4E);
  return _mm256_permute2f128_ps(a, a, 1);
}

#else

QSERVE_INLINE Uint4 load_4_bytes(const void* p) {
  const uint32_t all = load_bits<uint32_t>(p);
  return Uint4{all & 255, all >> 8 & 255, all >> 16 & 255, all >> 24};
}

QSERVE_INLINE F load_as(const Int8* x) {
  F out;
  each<4>([&](auto p) QSERVE_INLINE_LAMBDA {
    const Int4 codes = bit_copy<Int4>(load_4_bytes(x + 4 * p) << 24) >> 24;
    out.part[p] = __builtin_convertvector(codes, Float4);
  });
  return out;
}
// The bits of a float8 are those of a float16 with a shorter exponent, whose bias is 8 less.
QSERVE_INLINE F load_as(const Float8* x) {
  F out;
  each<4>([&](auto p) QSERVE_INLINE_LAMBDA {
    const Uint4 bits = load_4_bytes(x + 4 * p);
    out.part[p] = widen((bits & 0x80) << 8 | (bits & 0x7F) << 7);
  });
  return out;
}
QSERVE_INLINE void load_nibbles(const Nibbles* x, F& low, F& high) {
  each<4>([&](auto p) QSERVE_INLINE_LAMBDA {
    const Uint4 bytes = load_4_bytes(x + 4 * p);
    low.part[p] = __builtin_convertvector(bytes & 15, Float4);
    high.part[p] = __builtin_convertvector(bytes >> 4, Float4);
  });
}

// Lane i becomes lane i ^ Distance.
template <int Distance>
QSERVE_INLINE F exchange(F a) {
  F out;
  each<4>([&](auto p) QSERVE_INLINE_LAMBDA {
    const Float4 part = a.part[p ^ (Distance / 4)];
    if constexpr (Distance == 1) {
      out.part[p] = Float4{part[1], part[0], part[3], part[2]};
    } else if constexpr (Distance == 2) {
      out.part[p] = Float4{part[2], part[3], part[0], part[1]};
    } else {
      out.part[p] = part;
    }
  });
  return out;
}

#endif

// Vectors that are read together: a byte of nibbles belongs to two of them.
template <typename T>
constexpr int kTogether = 1;
template <>
constexpr int kTogether<Nibbles> = 2;

// V vectors of a row from element `column` on, a multiple of V * W. Nibbles come as they are read: W elements of the first half
// of the row, W of the second, and so on (see arrange).
template <int V, typename T>
QSERVE_INLINE void load_vectors(const T* row, int64_t column, F (&to)[V]) {
  if constexpr (kTogether<T> == 1) {
    each<V>([&](auto v) QSERVE_INLINE_LAMBDA { to[v] = load_as(row + column + v * W); });
  } else {
    each<V / 2>([&](auto v) QSERVE_INLINE_LAMBDA { load_nibbles(row + column / 2 + v * W, to[2 * v], to[2 * v + 1]); });
  }
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
