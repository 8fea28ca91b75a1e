// Products of float rows with panels of 16-bit or 32-bit floats.
#pragma once

#include "store_outputs.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

// R rows times V vectors of outputs, which may span panels. Each output is one chain of FMAs over k.
template <typename T, int R, int V>
void dense_tile(const DenseJob& job, int64_t row, int64_t panel) {
  static_assert(V % kVectorsPerPanel == 0, "whole panels");
  const T* weights = static_cast<const T*>(job.panels) + panel * job.k * kPanel;
  const int64_t panel_step = job.k * kPanel;
  const float* x = job.x + row * job.x_stride;
  F acc[R][V];
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA { each<V>([&](auto v) QSERVE_INLINE_LAMBDA { acc[r][v] = zero(); }); });
  for (int64_t k = 0; k < job.k; ++k) {
    F input[R];
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { input[r] = set1(x[r * job.x_stride + k]); });
    each<V>([&](auto v) QSERVE_INLINE_LAMBDA {
      const F w = load_as(weights + (v / kVectorsPerPanel) * panel_step + (v % kVectorsPerPanel) * W);
      each<R>([&](auto r) QSERVE_INLINE_LAMBDA { acc[r][v] = fma(input[r], w, acc[r][v]); });
    });
    weights += kPanel;
  }
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
    each<V>([&](auto v) QSERVE_INLINE_LAMBDA { store_outputs(job, row + r, panel * kPanel + v * W, acc[r][v]); });
  });
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
