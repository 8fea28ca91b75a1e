// The products that one instruction set offers, and the jobs they take.
//
// This header is included by objects that are compiled for different instruction sets, so it holds plain data only: an
// inline function here could be emitted with AVX-512 and then be called on a machine without it.
#pragma once

#include "layout.h"

namespace qserve {

// What the codes of a panel are; qserve.kernels.panels has the same in the same order. kInt8 is symmetric (128 stands for 0), the
// other integers have a zero point for each group and output.
enum class PanelFormat : int { kInt2, kInt3, kInt4, kInt8, kInt8Zeros, kCodebook, kFloat8 };
constexpr int kPanelFormats = 7;

// Rows rounded to int8. Rows lie in blocks of 8 (the rest in blocks of 4, 2 and 1); within a block of R rows
// codes are [padded_k / 4][R][4], scales and offsets [padded_k / 32][R], group_sums [num_groups][R].
struct QuantizedRows {
  int8_t* codes;
  float* scales;
  int32_t* offsets;   // -128 * sum of the codes of 32 inputs: undoes the bias of bytes
  float* group_sums;  // sum of scale * codes over a group of the weight: what a zero point multiplies
  int64_t padded_k;
  int64_t group_size;
};

// Rows to be rounded: to int8 for integer products (`to`), or to what they stand for (`floats`, [rows][padded_k]).
struct RoundJob {
  const float* x;
  int64_t x_stride;
  int64_t k;
  int64_t rows;
  Activations activations;
  QuantizedRows to;
  float* floats;
};

// A product with coded weights. What lies where in a panel is in panel_layout.h. Codes of 32 inputs of 16 outputs are 2 to 8
// lines of 64 bytes [16 outputs][4], byte j for the inputs j of some of the 8 quads (4 neighbouring inputs): the formats are in
// panel_formats.h.
struct PanelJob {
  const uint8_t* panels;
  int64_t panel_bytes;
  int64_t number_bytes;  // of the scales and zero points of a group
  int64_t code_bytes;    // of the codes of a group
  int64_t padded_k;
  int64_t group_size;  // a multiple of 32
  int64_t num_groups;
  int64_t out_features;
  int64_t wide;
  const float* bias;         // [panels][16] or null
  const float* codebook;     // [16]
  const uint8_t* byte_codebook;  // [16], biased by 128
  QuantizedRows quantized;   // int8 activations
  const float* x;            // or floats, rows of padded_k
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
  const float* bias;  // [panels][16] or null
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

using PanelKernel = void (*)(const PanelJob&, const TileRange&);

struct MatmulKernels {
  void (*quantize_rows)(const RoundJob&, int64_t begin, int64_t end);
  void (*round_rows)(const RoundJob&, int64_t begin, int64_t end);
  PanelKernel quantized[kPanelFormats];  // by format; null where there are no integer products
  PanelKernel exact[kPanelFormats];
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
