// The store into the cache and attention over it, as one instruction set offers them.
//
// This header is included by objects that are compiled for different instruction sets, so it holds plain data only: an
// inline function here could be emitted with AVX-512 and then be called on a machine without it.
#pragma once

#include "layout.h"

namespace qserve {

constexpr int64_t kSplit = 128;  // positions whose softmax is computed on its own

enum class KvFormat : int { kFloat32, kFloat16, kBfloat16, kFloat8, kInt8, kInt4 };

// Keys or values: rows of codes [num_blocks][num_kv_heads][block_size][head_dim] (two in a byte for kInt4), and for each row the
// bits of a float16 scale and offset, or null where the format has none.
struct CacheSide {
  void* codes;
  uint16_t* scales;
  uint16_t* offsets;
};

struct CacheView {
  CacheSide k, v;
  int64_t num_blocks, num_kv_heads, block_size, head_dim;
  KvFormat format;
};

struct RopeJob {
  float* qkv;
  int64_t stride;
  int64_t num_heads;
  const int32_t* positions;
  const int32_t* slots;
  const float* cos_sin;
  int64_t rotary_dim;
  bool interleaved;
  CacheView cache;
};

constexpr int64_t kWholeRow = 16;  // lanes of the widest vector: buffers hold heads of a multiple of it

// window: positions that a row sees. soft_cap: 0 is none. sinks: [num_heads] or null.
struct Scoring {
  float scale;
  int64_t window;
  float soft_cap;
  const float* sinks;
};

// width: head_dim up to a multiple of kWholeRow. direct: rows consist of whole vectors and can be read where they lie.
struct AttentionJob {
  const float* q;
  int64_t q_stride;
  float* out;
  int64_t out_stride;
  int64_t heads_per_kv;
  int64_t width;
  bool direct;
  Scoring scoring;
  CacheView cache;
};

// The running softmax of rows: largest score, sum of exponentials, weighted sum of values (not yet divided).
struct SoftmaxState {
  float* largest;  // [rows]
  float* sum;      // [rows]
  float* values;   // [rows][width]
};

// One split of one (sequence, KV head) for the query rows of a single token.
struct SplitWork {
  const int32_t* blocks;  // of the sequence
  int64_t kv_head;
  int64_t row;    // of q
  int64_t begin;  // of the split
  int64_t first;  // position that is seen
  int64_t end;    // of the positions that are seen
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

struct AttentionKernels {
  void (*rope_and_store)(const RopeJob&, int64_t begin, int64_t end, float* scratch);
  void (*attend_split)(const AttentionJob&, const SplitWork&);
  void (*merge_splits)(const AttentionJob&, int64_t row, int64_t kv_head, const SoftmaxState*, int64_t count, float* spare);
  void (*attend_chunk)(const AttentionJob&, const ChunkWork&);
};

namespace portable {
extern const AttentionKernels kAttentionKernels;
}
namespace avx2 {
extern const AttentionKernels kAttentionKernels;
}
namespace avx512 {
extern const AttentionKernels kAttentionKernels;
}

}  // namespace qserve
