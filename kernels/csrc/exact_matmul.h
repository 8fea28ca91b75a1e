// Products of float rows with panels of 4-bit or 8-bit codes: weights are dequantized in registers.
#pragma once

#include "quantized_matmul.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

// Four partial sums a row, input k in sum k % 4: short chains of FMAs, and an order that follows from K alone.
template <int R>
struct PartialSums {
  F sum[R][4];
};

template <int R, int J>
QSERVE_INLINE void accumulate(const F weight, const float* x, int64_t x_stride, PartialSums<R>& sums) {
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
    sums.sum[r][J] = fma(set1(x[r * x_stride]), weight, sums.sum[r][J]);
  });
}

template <int R>
QSERVE_INLINE void finish(const PanelJob& job, int64_t row, int64_t column, const PartialSums<R>& sums) {
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
    const auto& part = sums.sum[r];
    store_outputs(job, row + r, column, add(add(part[0], part[1]), add(part[2], part[3])));
  });
}

template <int R>
void int4_exact_tile(const PanelJob& job, int64_t row, const uint8_t* panel, int64_t column, int lane, int64_t) {
  const float* x = job.x + row * job.x_stride;
  const uint8_t* zeros = panel + job.zeros_offset + lane;
  const uint8_t* codes = panel + job.codes_offset + 4 * lane;
  PartialSums<R> sums;
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
    each<4>([&](auto j) QSERVE_INLINE_LAMBDA { sums.sum[r][j] = zero(); });
  });
  for (int64_t g = 0; g < job.num_groups; ++g) {
    const F zero_points = load_bytes(zeros + g * kPanel);
    const F scales = load_scales(job, panel, g, lane);
    for (int64_t k = 0; k < job.group_size; k += 8, x += 8, codes += 64) {
      const I both = load_lanes(codes);
#define QSERVE_INPUT(shift, j, at) \
  accumulate<R, j>(mul(sub(field<shift, 15>(both), zero_points), scales), x + at, job.x_stride, sums)
      QSERVE_INPUT(0, 0, 0);
      QSERVE_INPUT(8, 1, 1);
      QSERVE_INPUT(16, 2, 2);
      QSERVE_INPUT(24, 3, 3);
      QSERVE_INPUT(4, 0, 4);
      QSERVE_INPUT(12, 1, 5);
      QSERVE_INPUT(20, 2, 6);
      QSERVE_INPUT(28, 3, 7);
#undef QSERVE_INPUT
    }
  }
  finish(job, row, column, sums);
}

template <int R>
void int8_exact_tile(const PanelJob& job, int64_t row, const uint8_t* panel, int64_t column, int lane, int64_t) {
  const float* x = job.x + row * job.x_stride;
  const uint8_t* codes = panel + job.codes_offset + 4 * lane;
  const F bias = set1(128.0f);
  PartialSums<R> sums;
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
    each<4>([&](auto j) QSERVE_INLINE_LAMBDA { sums.sum[r][j] = zero(); });
  });
  int64_t left = job.k;  // the last group, and the last four inputs, may be incomplete
  for (int64_t g = 0; g < job.num_groups; ++g) {
    const F scales = load_scales(job, panel, g, lane);
    for (int64_t k = 0; k < job.group_size && left > 0; k += 4, x += 4, left -= 4, codes += 64) {
      const I four = load_lanes(codes);
#define QSERVE_INPUT(j) \
  if (left > j) accumulate<R, j>(mul(sub(field<8 * j, 255>(four), bias), scales), x + j, job.x_stride, sums)
      QSERVE_INPUT(0);
      QSERVE_INPUT(1);
      QSERVE_INPUT(2);
      QSERVE_INPUT(3);
#undef QSERVE_INPUT
    }
  }
  finish(job, row, column, sums);
}

// Blocks of 8 rows are taken in halves: 4 x 4 sums fill the registers.

template <TileFunction Tile>
void in_halves(const PanelJob& job, int64_t row, const uint8_t* panel, int64_t column, int lane, int64_t ahead) {
  Tile(job, row, panel, column, lane, ahead);
  Tile(job, row + 4, panel, column, lane, ahead);
}

void int4_exact(const PanelJob& job, const TileRange& range) {
  run_tiles(job, range, {int4_exact_tile<1>, int4_exact_tile<2>, int4_exact_tile<4>, in_halves<int4_exact_tile<4>>});
}

void int8_exact(const PanelJob& job, const TileRange& range) {
  run_tiles(job, range, {int8_exact_tile<1>, int8_exact_tile<2>, int8_exact_tile<4>, in_halves<int8_exact_tile<4>>});
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
