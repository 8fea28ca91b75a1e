// One vocabulary for three instruction sets: F and I are vectors of W floats and 32-bit integers.
//
// Everything here has internal linkage and is inlined by force, and nothing of the C++ library is used: the same code is
// compiled with and without AVX-512, and a shared inline function would be taken from either.
#pragma once

#include <cstdint>

#define QSERVE_INLINE [[gnu::always_inline]] static inline
#define QSERVE_INLINE_LAMBDA __attribute__((always_inline))
#define QSERVE_INLINE_METHOD [[gnu::always_inline]] inline

namespace qserve::QSERVE_NAMESPACE {
namespace {
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

// A number known to the compiler, and a loop over such numbers. An array that is only indexed by them becomes registers before
// the optimizer starts; with a plain loop, even an unrolled one, GCC 12 keeps a copy of the array in memory (2 times slower).
template <int Value>
struct Index {
  constexpr operator int() const { return Value; }
};

template <int Count, int First = 0, typename Function>
QSERVE_INLINE void each(const Function& function) {
  if constexpr (First < Count) {
    function(Index<First>{});
    each<Count, First + 1>(function);
  }
}
}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE

#if defined(__AVX512VNNI__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace qserve::QSERVE_NAMESPACE {
namespace {

constexpr int kVectorsPerPanel = int(kPanel) / W;

// e^x, relative error below 2e-7 for x in -87..88; outside, the value at the end of that range, and NaN for NaN (the
// operands of min and max are in the order that keeps one).
// x = n ln 2 + r, then the minimax polynomial of degree 6 that Cephes' expf uses for e^r on +-ln 2 / 2.
QSERVE_INLINE F exp(F x) {
  const F clamped = max(set1(-87.0f), min(set1(88.0f), x));
  const F n = round_even(mul(clamped, set1(1.44269504088896341f)));
  F r = fnma(n, set1(0.693359375f), clamped);  // ln 2 in two parts: the first has few bits, so n * it is exact
  r = fnma(n, set1(-2.12194440e-4f), r);
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(mul(r, r), p, add(r, set1(1.0f)));
  return mul(p, pow2(n));
}

// Rows of a block of the quantized layout, 8 and then what is left: 4, 2, 1.
QSERVE_INLINE int block_rows(int64_t rows_left) {
  return rows_left >= 8 ? 8 : rows_left >= 4 ? 4 : rows_left >= 2 ? 2 : 1;
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
