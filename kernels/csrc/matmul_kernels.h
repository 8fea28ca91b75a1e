// The products that one instruction set offers, and the jobs they take.
//
// This header is included by objects that are compiled for different instruction sets, so it holds plain data only: an
// inline function here could be emitted with AVX-512 and then be called on a machine without it.
#pragma once

#include "layout.h"

namespace qserve {

// Rows rounded to int8. Rows lie in blocks of 8 (the rest in blocks of 4, 2 and 1); within a block of R rows
// codes are [padded_k / 4][R][4], scales and offsets [padded_k / 32][R], group_sums [num_groups][R].
struct QuantizedRows {
  int8_t* codes;
  float* scales;
  int32_t* offsets;   // -128 * sum of the codes of 32 inputs: undoes the bias of int8 weights
  float* group_sums;  // sum of scale * codes over a group of the weight: what a zero point multiplies
  int64_t padded_k;
  int64_t group_size;
};

struct QuantizeJob {
  const float* x;
  int64_t x_stride;
  int64_t k;
  int64_t rows;
  QuantizedRows to;
};

// A product with an integer weight. A panel is: scales [groups][16] (float16, or float32 when wide), for int4 zero points
// [groups][16] bytes, padding to 64 bytes, codes. Codes of int4: [k / 8][16 outputs][4 bytes], byte j holds input j in its
// low and input j + 4 in its high half. Codes of int8: [k / 4][16][4], biased by 128.
struct PanelJob {
  const uint8_t* panels;
  int64_t panel_bytes;
  int64_t codes_offset;
  int64_t zeros_offset;
  int64_t k;
  int64_t group_size;
  int64_t num_groups;
  int64_t out_features;
  int64_t wide;
  QuantizedRows quantized;  // int8 activations
  const float* x;           // or exact ones
  int64_t x_stride;
  int64_t rows;
  float* out;
  int64_t out_stride;
};

// A product with a float weight in panels [k][16].
struct DenseJob {
  const void* panels;
  FloatType type;
  int64_t k;
  int64_t out_features;
  const float* x;
  int64_t x_stride;
  int64_t rows;
  float* out;
  int64_t out_stride;
};

// The part of a product that one task computes; rows begin at a block of kRowBlock.
struct TileRange {
  int64_t row_begin, row_end, panel_begin, panel_end;
};

struct MatmulKernels {
  void (*quantize_rows)(const QuantizeJob&, int64_t begin, int64_t end);
  void (*int4_quantized)(const PanelJob&, const TileRange&);
  void (*int4_exact)(const PanelJob&, const TileRange&);
  void (*int8_quantized)(const PanelJob&, const TileRange&);
  void (*int8_exact)(const PanelJob&, const TileRange&);
  void (*dense)(const DenseJob&, const TileRange&);
};

namespace portable {
extern const MatmulKernels kMatmulKernels;
}
namespace avx2 {
extern const MatmulKernels kMatmulKernels;
}
namespace avx512 {
extern const MatmulKernels kMatmulKernels;
}

}  // namespace qserve
