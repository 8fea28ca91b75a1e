// What one instruction set offers: a table of functions on plain memory, and the jobs they take.
//
// This header is included by objects that are compiled for different instruction sets, so it holds plain data only: an
// inline function here could be emitted with AVX-512 and then be called on a machine without it.
#pragma once

#include <cstdint>

namespace qserve {

constexpr int64_t kPanel = 16;            // outputs of a panel
constexpr int64_t kActivationGroup = 32;  // inputs that share an int8 scale
constexpr int64_t kRowBlock = 8;          // rows that are multiplied with a weight once it is unpacked
constexpr int64_t kSplit = 128;           // positions whose softmax is computed on its own

enum class FloatType : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

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

struct NormJob {
  const float* x;
  int64_t x_stride;
  float* residual;  // may be null
  int64_t residual_stride;
  const float* weight;
  float eps;
  float* out;
  int64_t out_stride;
  int64_t width;
};

struct SiluJob {
  const float* gate_up;
  int64_t x_stride;
  float* out;
  int64_t out_stride;
  int64_t width;
};

struct CacheView {
  void* k;
  void* v;
  int64_t num_blocks, num_kv_heads, block_size, head_dim;
  FloatType type;
};

struct RopeJob {
  float* qkv;
  int64_t stride;
  int64_t num_heads;
  const int32_t* positions;
  const int32_t* slots;
  const float* cos_sin;
  CacheView cache;
};

struct AttentionJob {
  const float* q;
  int64_t q_stride;
  float* out;
  int64_t out_stride;
  int64_t heads_per_kv;
  float scale;
  CacheView cache;
};

// The running softmax of rows: largest score, sum of exponentials, weighted sum of values (not yet divided).
struct SoftmaxState {
  float* largest;  // [rows]
  float* sum;      // [rows]
  float* values;   // [rows][head_dim]
};

// One split of one (sequence, KV head) for the query rows of a single token.
struct SplitWork {
  const int32_t* blocks;  // of the sequence
  int64_t kv_head;
  int64_t row;            // of q
  int64_t begin, end;     // positions
  SoftmaxState to;
  float* scratch;
};

// Consecutive query tokens of one (sequence, KV head), over all positions they see.
struct ChunkWork {
  const int32_t* blocks;
  int64_t kv_head;
  int64_t row, num_rows;   // of q
  int64_t first_position;  // of the first row
  float* scratch;
};

struct KernelTable {
  const char* name;
  void (*quantize_rows)(const QuantizeJob&, int64_t begin, int64_t end);
  void (*int4_quantized)(const PanelJob&, const TileRange&);
  void (*int4_exact)(const PanelJob&, const TileRange&);
  void (*int8_quantized)(const PanelJob&, const TileRange&);
  void (*int8_exact)(const PanelJob&, const TileRange&);
  void (*dense)(const DenseJob&, const TileRange&);
  void (*rms_norm)(const NormJob&, int64_t begin, int64_t end);
  void (*silu_mul)(const SiluJob&, int64_t begin, int64_t end);
  void (*rope_and_store)(const RopeJob&, int64_t begin, int64_t end);
  void (*attend_split)(const AttentionJob&, const SplitWork&);
  void (*merge_splits)(const AttentionJob&, int64_t row, int64_t kv_head, const SoftmaxState*, int64_t count);
  void (*attend_chunk)(const AttentionJob&, const ChunkWork&);
};

namespace portable {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}

}  // namespace qserve
