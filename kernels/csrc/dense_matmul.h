// Products of float rows with panels of 16-bit or 32-bit floats.
#pragma once

#include "simd.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

// R rows times V vectors of outputs, which may span panels. Each output is one chain of FMAs over k.
template <typename T, int R, int V>
void dense_tile(const DenseJob& job, int64_t row, int64_t panel) {
  constexpr int panels = (V + kVectorsPerPanel - 1) / kVectorsPerPanel;
  const T* weights = static_cast<const T*>(job.panels) + panel * job.k * kPanel;
  const int64_t panel_step = job.k * kPanel;
  const float* x = job.x + row * job.x_stride;
  F acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  for (int64_t k = 0; k < job.k; ++k) {
    F w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      w[v] = load_as(weights + (v / kVectorsPerPanel) * panel_step + (v % kVectorsPerPanel) * W);
    weights += kPanel;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F input = set1(x[r * job.x_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = fma(input, w[v], acc[r][v]);
    }
  }
  static_assert(panels * kVectorsPerPanel == V, "whole panels");
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int64_t column = panel * kPanel + v * W;
      const int64_t left = job.out_features - column;
      float* out = job.out + (row + r) * job.out_stride + column;
      if (left >= W) {
        store(out, acc[r][v]);
      } else if (left > 0) {
        store_part(out, acc[r][v], int(left));
      }
    }
}

template <typename T, int V>
void dense_rows(const DenseJob& job, const TileRange& range, int64_t panel) {
  int64_t row = range.row_begin;
  for (; row + kDenseRows <= range.row_end; row += kDenseRows) dense_tile<T, kDenseRows, V>(job, row, panel);
  if constexpr (kDenseRows > 4) {
    for (; row + 4 <= range.row_end; row += 4) dense_tile<T, 4, V>(job, row, panel);
  }
  if constexpr (kDenseRows > 2) {
    for (; row + 2 <= range.row_end; row += 2) dense_tile<T, 2, V>(job, row, panel);
  }
  for (; row < range.row_end; ++row) dense_tile<T, 1, V>(job, row, panel);
}

template <typename T>
void dense_of(const DenseJob& job, const TileRange& range) {
  constexpr int together = kDenseVectors / kVectorsPerPanel;
  int64_t panel = range.panel_begin;
  for (; panel + together <= range.panel_end; panel += together) dense_rows<T, kDenseVectors>(job, range, panel);
  for (; panel < range.panel_end; ++panel) dense_rows<T, kVectorsPerPanel>(job, range, panel);
}

void dense(const DenseJob& job, const TileRange& range) {
  switch (job.type) {
    case FloatType::kFloat32:
      return dense_of<float>(job, range);
    case FloatType::kFloat16:
      return dense_of<Half>(job, range);
    case FloatType::kBfloat16:
      return dense_of<Bfloat>(job, range);
  }
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
