// What one instruction set does to each row on its own: norms, activations, and the first look at a row of logits.
//
// This header is included by objects that are compiled for different instruction sets, so it holds plain data only: an
// inline function here could be emitted with AVX-512 and then be called on a machine without it.
#pragma once

#include "layout.h"

namespace qserve {

struct NormJob {
  const float* x;
  int64_t x_stride;
  float* residual;  // may be null
  int64_t residual_stride;
  const float* weight;
  float weight_offset;
  float eps;
  float* out;
  int64_t out_stride;
  int64_t width;
};

// x [H], or x + residual, normed and rounded to int8 with one scale a row. out of `norm` is not used.
struct RoundedNormJob {
  NormJob norm;
  int8_t* codes;  // [rows][width]
  float* scales;  // [rows]
};

struct LayerNormJob {
  NormJob norm;
  const float* bias;  // may be null
};

enum class Gate : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

struct GateJob {
  const float* gate_up;
  int64_t x_stride;
  float* out;
  int64_t out_stride;
  int64_t width;
  Gate gate;
};

// out = cap * tanh(x / cap)
struct SoftCapJob {
  const float* x;
  int64_t x_stride;
  float* out;
  int64_t out_stride;
  int64_t width;
  float cap;
};

// out [rows][width] = sum over j of weights [rows][count] times x [rows][count][width].
struct WeightedSumJob {
  const float* x;
  const float* weights;
  float* out;
  int64_t out_stride;
  int64_t count;
  int64_t width;
};

// Numbers of a row that are looked at together.
constexpr int64_t kStretch = 256;

// The largest of each stretch of x [count], and the sum of e^(scale * (x - largest)) over it; a stretch that holds a NaN has
// NaN for both, one of nothing but -infinity the sum 0. sums may be null.
struct SummaryJob {
  const float* x;
  int64_t count;
  float scale;
  float* tops;
  float* sums;
};

struct RowKernels {
  void (*rms_norm)(const NormJob&, int64_t begin, int64_t end);
  void (*rms_norm_int8)(const RoundedNormJob&, int64_t begin, int64_t end);
  void (*layer_norm)(const LayerNormJob&, int64_t begin, int64_t end);
  void (*gated_activation)(const GateJob&, int64_t begin, int64_t end);
  void (*soft_cap)(const SoftCapJob&, int64_t begin, int64_t end);
  void (*weighted_sum)(const WeightedSumJob&, int64_t begin, int64_t end);
  float (*largest)(const float* x, int64_t count);  // NaN if one is
  void (*summarize)(const SummaryJob&);
};

namespace portable {
extern const RowKernels kRowKernels;
}
namespace avx2 {
extern const RowKernels kRowKernels;
}
namespace avx512 {
extern const RowKernels kRowKernels;
}

}  // namespace qserve
