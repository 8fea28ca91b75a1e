// The ops that know sequences: rotation and store into the cache, attention over it.
#pragma once

#include "attention_kernels.h"

namespace qserve {

// Throws std::invalid_argument for a position outside the table or a slot outside the cache.
void rope_and_store(const RopeJob& job, int64_t num_tokens, int64_t max_positions);

// Which rows of q belong to which sequence, and where its positions are.
struct RaggedBatch {
  const int32_t* block_tables;
  int64_t max_blocks;
  const int32_t* context_lens;
  const int32_t* starts;  // [num_sequences + 1]
  int64_t num_sequences;
  int64_t num_rows;
};

// Fills in the width of `job` and whether rows are direct. Throws std::invalid_argument for lengths, starts or blocks that do not
// fit together.
void paged_attention(AttentionJob job, const RaggedBatch& batch);

}  // namespace qserve
