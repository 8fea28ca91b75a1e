// Products of float rows with panels of codes: codes become floats in registers.
#pragma once

#include "quantized_matmul.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

constexpr int kExactRows = 4;  // whose sums fit the registers

// For every group: y += s * sum of x * value. The sum of a group is in parts, input k in part k % kExactSums, whatever R is: the
// order of sums follows from K alone.
template <typename Format, int R>
void exact_tile(const PanelJob& job, int64_t row, const uint8_t* panel, int64_t column, int lane, int64_t) {
  const Format format(job);
  const float* x = job.x + row * job.x_stride;
  F acc[R];
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA { acc[r] = zero(); });
  for (int64_t g = 0; g < job.num_groups; ++g) {
    const GroupPlace place = place_of_group(job, g);
    const uint8_t* codes = panel + place.codes + 4 * lane;
    F zero_points = set1(Format::kBias);
    if constexpr (Format::kZeroPoints) zero_points = load_bytes(panel + place.zero_points + lane);
    F part[R][kExactSums];
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { each<kExactSums>([&](auto j) QSERVE_INLINE_LAMBDA { part[r][j] = zero(); }); });
    for (int64_t k = 0; k < job.group_size; k += kActivationGroup) {
      Format::quads(codes, [&](auto quad, I bytes) QSERVE_INLINE_LAMBDA {
        each<4>([&](auto j) QSERVE_INLINE_LAMBDA {
          const F value = format.template value<j>(bytes, zero_points);
          each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
            F& sum = part[r][j % kExactSums];
            sum = fma(set1(x[r * job.x_stride + 4 * quad + j]), value, sum);
          });
        });
      });
      codes += 64 * Format::kLines;
      x += kActivationGroup;
    }
    const F scales = load_scales(job, panel + place.scales, lane);
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
      F sum = add(part[r][0], part[r][1]);
      if constexpr (kExactSums == 4) sum = add(sum, add(part[r][2], part[r][3]));
      acc[r] = fma(sum, scales, acc[r]);
    });
  }
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA { store_outputs(job, row + r, column, acc[r]); });
}

// A block of rows, a few at a time.
template <typename Format, int R>
void exact_block(const PanelJob& job, int64_t row, const uint8_t* panel, int64_t column, int lane, int64_t ahead) {
  constexpr int rows = R < kExactRows ? R : kExactRows;
  for (int r = 0; r < R; r += rows) exact_tile<Format, rows>(job, row + r, panel, column, lane, ahead);
}

template <typename Format>
void exact_product(const PanelJob& job, const TileRange& range) {
  run_tiles(job, range, {exact_block<Format, 1>, exact_block<Format, 2>, exact_block<Format, 4>, exact_block<Format, 8>});
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
