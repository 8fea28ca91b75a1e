// What one instruction set does to each row on its own: norms and activations.
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

enum class Gate : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

struct GateJob {
  const float* gate_up;
  int64_t x_stride;
  float* out;
  int64_t out_stride;
  int64_t width;
  Gate gate;
};

struct RowKernels {
  void (*rms_norm)(const NormJob&, int64_t begin, int64_t end);
  void (*gated_activation)(const GateJob&, int64_t begin, int64_t end);
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
