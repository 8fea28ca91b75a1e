// The next token of each row, drawn from its logits.
#pragma once

#include <cstdint>

namespace qserve {

// See SamplingBatch in kernels/sample/batch.py, whose arrays these are.
struct SamplingJob {
  float* logits;  // [rows][vocabulary], overwritten where tokens are adjusted
  int64_t stride;
  int64_t rows;
  int64_t vocabulary;
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const float* repetition_penalty;
  const float* frequency_penalty;
  const float* presence_penalty;
  const double* uniforms;
  const int32_t* starts;  // [rows + 1], or null: no token is adjusted
  const int32_t* token_ids;
  const float* biases;
  const int32_t* counts;
  int64_t num_adjustments;
  int64_t* tokens;  // [rows], written: -1 where there is none
};

// Throws std::invalid_argument for adjustments of tokens or rows that are not there.
void sample_tokens(const SamplingJob& job);

}  // namespace qserve
