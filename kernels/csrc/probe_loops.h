// The loops that find out what a machine can do at best.
#pragma once

#include "probe_kernels.h"
#include "simd.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

constexpr int kVectorBytes = W * int(sizeof(float));
constexpr int64_t kReadBytes = 512;  // of a round of the loop that reads
constexpr int64_t kStepBytes = 512;  // distance of the operands of two steps

int32_t read_memory(const uint8_t* memory, int64_t bytes) {
  constexpr int kLoads = kReadBytes / kVectorBytes;
  I sums[kLoads];
  each<kLoads>([&](auto i) QSERVE_INLINE_LAMBDA { sums[i] = int_zero(); });
  for (int64_t at = 0; at < bytes; at += kReadBytes) {
    each<kLoads>([&](auto i) QSERVE_INLINE_LAMBDA {
      sums[i] = int_max(sums[i], load_lanes(memory + at + i * kVectorBytes));
    });
  }
  each<kLoads - 1>([&](auto i) QSERVE_INLINE_LAMBDA { sums[0] = int_max(sums[0], sums[i + 1]); });
  return int_max_lanes(sums[0]);
}

// A register tile of Rows x 4 sums, so that there are more products than loads and a product need not wait for the last one.
// Operands change with every step, else the compiler would multiply once.
constexpr int kColumns = 4;

template <int Rows, typename V, typename Load, typename Multiply>
QSERVE_INLINE V run_tile(const uint8_t* operands, int64_t steps, V nothing, const Load& load_at, const Multiply& multiply) {
  constexpr int kSums = Rows * kColumns, kUnrolled = 4;
  V sums[kSums];
  each<kSums>([&](auto i) QSERVE_INLINE_LAMBDA { sums[i] = nothing; });
  for (int64_t step = 0; step < steps; step += kUnrolled) {
    const uint8_t* first = operands + step * kStepBytes % kProbeBytes;
    each<kUnrolled>([&](auto u) QSERVE_INLINE_LAMBDA {
      const uint8_t* at = first + u * kStepBytes;
      V columns[kColumns];
      each<kColumns>([&](auto i) QSERVE_INLINE_LAMBDA { columns[i] = load_at(at + i * kVectorBytes); });
      each<Rows>([&](auto r) QSERVE_INLINE_LAMBDA {
        const V row = load_at(at + (kColumns + r) * kVectorBytes);
        each<kColumns>([&](auto i) QSERVE_INLINE_LAMBDA {
          constexpr int sum = int(r) * kColumns + int(i);
          sums[sum] = multiply(columns[i], row, sums[sum]);
        });
      });
    });
  }
  each<kSums - 1>([&](auto i) QSERVE_INLINE_LAMBDA { sums[0] = multiply(sums[0], sums[i + 1], sums[0]); });
  return sums[0];
}

// A product of bytes on AVX2 is two instructions, and GCC keeps the sums of before and after: more rows are spilled.
constexpr int kByteRows = W == 8 ? 1 : 2;
constexpr int kFloatRows = 2;

int64_t multiply_bytes(const uint8_t* operands, int64_t steps) {
  const I all = run_tile<kByteRows, I>(
      operands, steps, int_zero(), [](const uint8_t* p) QSERVE_INLINE_LAMBDA { return load_lanes(p); },
      [](I a, I b, I sum) QSERVE_INLINE_LAMBDA { return multiply_add_bytes(a, b, sum); });
  const int64_t unused = int_max_lanes(all) == -1;  // never: but the sums have to be there to know
  return steps * kByteRows * kColumns * kByteProducts + unused;
}

int64_t multiply_floats(const uint8_t* operands, int64_t steps) {
  const F all = run_tile<kFloatRows, F>(
      operands, steps, zero(),
      [](const uint8_t* p) QSERVE_INLINE_LAMBDA { return load(reinterpret_cast<const float*>(p)); },
      [](F a, F b, F sum) QSERVE_INLINE_LAMBDA { return fma(a, b, sum); });
  const int64_t unused = max_lanes(all) < 0.0f;  // never, as above
  return steps * kFloatRows * kColumns * W + unused;
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
