// The Hadamard transform of a head, as kernels/hadamard.py defines it and with its order of operations.
#pragma once

#include "kv_vectors.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

// 1 where a lane is the first of its pair, -1 where it is the second; pairs lie 1, 2, 4 and 8 lanes apart.
alignas(64) constexpr float kPairSigns[4][16] = {
    {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
    {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
    {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
    {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
};

template <int Stage>
QSERVE_INLINE void add_lane_pairs(float* x, int64_t width) {
  const F signs = load(kPairSigns[Stage]);
  for (int64_t i = 0; i < width; i += W) {
    const F both = load(x + i);
    store(x + i, add(exchange<1 << Stage>(both), mul(both, signs)));
  }
}

QSERVE_INLINE void add_pairs(float* x, int64_t width, int64_t distance) {
  for (int64_t begin = 0; begin < width; begin += 2 * distance) {
    for (int64_t i = begin; i < begin + distance; i += W) {
      const F first = load(x + i), second = load(x + i + distance);
      store(x + i, add(first, second));
      store(x + i + distance, sub(first, second));
    }
  }
}

// Every run of `run` (a power of two) of `width` elements; there is room for whole vectors, and what is beyond `width` is lost.
void rotate_runs(float* x, int64_t width, int64_t run) {
  if (run > 1) add_lane_pairs<0>(x, width);
  if (run > 2) add_lane_pairs<1>(x, width);
  if (run > 4) add_lane_pairs<2>(x, width);
  if constexpr (W > 8) {
    if (run > 8) add_lane_pairs<3>(x, width);
  }
  for (int64_t distance = W; distance < run; distance *= 2) add_pairs(x, width, distance);
  const F unit = set1(__builtin_sqrtf(1.0f / float(run)));
  for (int64_t i = 0; i < width; i += W) store(x + i, mul(load(x + i), unit));
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
