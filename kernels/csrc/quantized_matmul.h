// Products of int8 rows with panels of codes.
#pragma once

#include "panel_formats.h"
#include "panel_layout.h"
#include "store_outputs.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

QSERVE_INLINE F load_scales(const PanelJob& job, const uint8_t* scales, int lane) {
  if (job.wide) return load(reinterpret_cast<const float*>(scales) + lane);
  return load_as(reinterpret_cast<const Half*>(scales) + lane);
}

// Lines of memory that will be needed; an address outside of it is ignored by the machine.
template <int Count>
QSERVE_INLINE void prefetch(const uint8_t* p) {
  each<Count>([&](auto i) QSERVE_INLINE_LAMBDA { __builtin_prefetch(p + 64 * i, 0, 2); });
}

// For every group: y += s * (sum of sx * dot - z * sum of sx * x); the order of sums follows from K alone.
template <typename Format, int R>
void quantized_tile(const PanelJob& job, int64_t row, const uint8_t* panel, int64_t column, int lane, int64_t ahead) {
  const Format format(job);
  const QuantizedRows& q = job.quantized;
  const int64_t subgroups = job.group_size / kActivationGroup;
  const int8_t* rows = q.codes + row * q.padded_k;
  const float* scales = q.scales + row * (q.padded_k / kActivationGroup);
  const int32_t* offsets = q.offsets + row * (q.padded_k / kActivationGroup);
  const float* sums = q.group_sums + row * job.num_groups;
  F acc[R];
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA { acc[r] = zero(); });
  for (int64_t g = 0; g < job.num_groups; ++g) {
    const GroupPlace place = place_of_group(job, g);
    const uint8_t* codes = panel + place.codes + 4 * lane;
    F total[R];
    if constexpr (Format::kZeroPoints) {
      F zero_points = load_bytes(panel + place.zero_points + lane);
      if constexpr (Format::kBias != 0) zero_points = sub(zero_points, set1(Format::kBias));
      each<R>([&](auto r) QSERVE_INLINE_LAMBDA { total[r] = mul(zero_points, set1(-sums[r])); });
    } else {
      each<R>([&](auto r) QSERVE_INLINE_LAMBDA { total[r] = zero(); });
    }
    for (int64_t s = 0; s < subgroups; ++s) {
      typename Format::template Dot<R> dot(offsets);
      if (ahead != 0) prefetch<Format::kLines>(codes + ahead);
      Format::quads(codes, [&](auto quad, I bytes) QSERVE_INLINE_LAMBDA { dot.add(quad, format.operand(bytes), rows); });
      each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
        total[r] = fma(to_float(dot.total(r)), set1(scales[r]), total[r]);
      });
      codes += 64 * Format::kLines;
      rows += kActivationGroup * R;
      scales += R;
      offsets += R;
    }
    const F weight_scales = load_scales(job, panel + place.scales, lane);
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { acc[r] = fma(total[r], weight_scales, acc[r]); });
    sums += R;
  }
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA { store_outputs(job, row + r, column, acc[r]); });
}

using TileFunction = void (*)(const PanelJob&, int64_t, const uint8_t*, int64_t, int, int64_t);

struct TileFunctions {
  TileFunction rows_1, rows_2, rows_4, rows_8;
};

QSERVE_INLINE TileFunction tile_for(const TileFunctions& tiles, int rows) {
  return rows == 8 ? tiles.rows_8 : rows == 4 ? tiles.rows_4 : rows == 2 ? tiles.rows_2 : tiles.rows_1;
}

// A panel stays in the first-level cache while all rows pass by. With more than one block of rows, the last block fetches
// the next panel: the memory would else be idle until the first block waits for it. A single block is left to the machine's
// own prefetching, which sees one long stream.
QSERVE_INLINE void run_tiles(const PanelJob& job, const TileRange& range, const TileFunctions& tiles) {
  for (int64_t p = range.panel_begin; p < range.panel_end; ++p) {
    const uint8_t* panel = job.panels + p * job.panel_bytes;
    for (int64_t row = range.row_begin; row < range.row_end;) {
      const int rows = block_rows(job.rows - row);
      const TileFunction tile = tile_for(tiles, rows);
      const bool last = row != range.row_begin && row + rows == range.row_end;
      const int64_t ahead = last ? job.panel_bytes : 0;
      for (int lane = 0; lane < kPanel; lane += W) tile(job, row, panel, p * kPanel + lane, lane, ahead);
      row += rows;
    }
  }
}

template <typename Format>
void quantized_product(const PanelJob& job, const TileRange& range) {
  run_tiles(job, range,
            {quantized_tile<Format, 1>, quantized_tile<Format, 2>, quantized_tile<Format, 4>, quantized_tile<Format, 8>});
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
