// The tasks of paged attention: a split of a decode row, the merge of its splits, a chunk of a prompt.
#pragma once

#include "attention.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

// scratch: scaled queries [heads][width], scores [kQueryRows][kSplit].
template <typename T>
void attend_split_of(const AttentionJob& job, const SplitWork& work) {
  const int64_t width = job.cache.head_dim, heads = job.heads_per_kv;
  float* q = work.scratch;
  float* scores = q + heads * width;
  SplitRows<T> rows;
  find_rows(job.cache, work.blocks, work.kv_head, work.begin, work.end, rows);
  for (int64_t h = 0; h < heads; ++h) scale_query(job, work.row, work.kv_head * heads + h, q + h * width);
  int64_t seen[kQueryRows];
  for (int64_t& count : seen) count = work.end - work.begin;
  for (int64_t h = 0; h < heads; h += kQueryRows) {
    const int num_rows = heads - h < kQueryRows ? int(heads - h) : kQueryRows;
    attend_some(num_rows, q + h * width, rows, seen, width, scores, at_row(work.to, h, width));
  }
}

void attend_split(const AttentionJob& job, const SplitWork& work) {
  switch (job.cache.type) {
    case FloatType::kFloat32:
      return attend_split_of<float>(job, work);
    case FloatType::kFloat16:
      return attend_split_of<Half>(job, work);
    case FloatType::kBfloat16:
      return attend_split_of<Bfloat>(job, work);
  }
}

// Splits one after the other into the first, then the quotient to out.
void merge_splits(const AttentionJob& job, int64_t row, int64_t kv_head, const SoftmaxState* splits, int64_t count) {
  const int64_t width = job.cache.head_dim;
  for (int64_t h = 0; h < job.heads_per_kv; ++h) {
    const SoftmaxState state = at_row(splits[0], h, width);
    for (int64_t s = 1; s < count; ++s) merge_row(*state.largest, *state.sum, state.values, splits[s], h, width);
    write_row(job, row, kv_head * job.heads_per_kv + h, state.values, *state.sum);
  }
}

// Keys and values of a split as float, once for all rows of a chunk.
template <typename T>
void widen_rows(const SplitRows<T>& rows, int64_t count, int64_t width, float* keys, float* values,
                SplitRows<float>& wide) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; d += W) {
      store(keys + i * width + d, load_as(rows.keys[i] + d));
      store(values + i * width + d, load_as(rows.values[i] + d));
    }
    wide.keys[i] = keys + i * width;
    wide.values[i] = values + i * width;
  }
  for (int64_t i = count; i % W != 0; ++i) wide.keys[i] = wide.keys[i - 1];
}

// Rows of a chunk are (token, head) pairs, heads fastest. scratch: queries [rows][width]; running largest and sum [rows] and
// values [rows][width]; keys and values [kSplit][width]; scores [kQueryRows][kSplit]; a fresh state for kQueryRows rows.
template <typename T>
void attend_chunk_of(const AttentionJob& job, const ChunkWork& work) {
  const int64_t width = job.cache.head_dim, heads = job.heads_per_kv, total = work.num_rows * heads;
  float* q = work.scratch;
  const SoftmaxState state{q + total * width, q + total * (width + 1), q + total * (width + 2)};
  float* keys = state.values + total * width;
  float* values = keys + kSplit * width;
  float* scores = values + kSplit * width;
  float* spare = scores + kQueryRows * kSplit;
  const SoftmaxState fresh{spare, spare + kQueryRows, spare + 2 * kQueryRows};
  for (int64_t r = 0; r < total; ++r)
    scale_query(job, work.row + r / heads, work.kv_head * heads + r % heads, q + r * width);
  const int64_t positions = work.first_position + work.num_rows;
  SplitRows<T> rows;
  SplitRows<float> wide;
  for (int64_t begin = 0; begin < positions; begin += kSplit) {
    const int64_t end = begin + kSplit < positions ? begin + kSplit : positions;
    find_rows(job.cache, work.blocks, work.kv_head, begin, end, rows);
    widen_rows(rows, end - begin, width, keys, values, wide);
    const int64_t first_token = begin > work.first_position ? begin - work.first_position : 0;
    for (int64_t r = first_token * heads; r < total; r += kQueryRows) {
      const int num_rows = total - r < kQueryRows ? int(total - r) : kQueryRows;
      int64_t seen[kQueryRows];
      for (int i = 0; i < num_rows; ++i) {
        const int64_t limit = work.first_position + (r + i) / heads + 1;
        seen[i] = (limit < end ? limit : end) - begin;
      }
      if (begin == 0) {
        attend_some(num_rows, q + r * width, wide, seen, width, scores, at_row(state, r, width));
        continue;
      }
      attend_some(num_rows, q + r * width, wide, seen, width, scores, fresh);
      for (int i = 0; i < num_rows; ++i) {
        const SoftmaxState row = at_row(state, r + i, width);
        merge_row(*row.largest, *row.sum, row.values, fresh, i, width);
      }
    }
  }
  for (int64_t r = 0; r < total; ++r)
    write_row(job, work.row + r / heads, work.kv_head * heads + r % heads, state.values + r * width, state.sum[r]);
}

void attend_chunk(const AttentionJob& job, const ChunkWork& work) {
  switch (job.cache.type) {
    case FloatType::kFloat32:
      return attend_chunk_of<float>(job, work);
    case FloatType::kFloat16:
      return attend_chunk_of<Half>(job, work);
    case FloatType::kBfloat16:
      return attend_chunk_of<Bfloat>(job, work);
  }
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
