// The tasks of paged attention: a split of a decode row, the merge of its splits, a chunk of a prompt.
#pragma once

#include "attention.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

// scratch: scaled queries [heads][width], scores [kQueryRows][kSplit], and what rows that are not direct are widened to:
// keys and values [kSplit][width].
template <typename T>
void attend_split_of(const AttentionJob& job, const SplitWork& work) {
  const int64_t width = job.width, heads = job.heads_per_kv;
  float* q = work.scratch;
  float* scores = q + heads * width;
  float* spare = scores + kQueryRows * kSplit;
  const Span span{work.first - work.begin, work.end - work.begin};
  SplitRows<T> rows;
  SplitRows<float> wide;
  SplitNumbers numbers;
  find_rows(job.cache, work.blocks, work.kv_head, work.begin, span, rows);
  fetch_rows(job.cache, rows.keys, span);
  fetch_rows(job.cache, rows.values, span);
  find_numbers(job.cache, work.blocks, work.kv_head, work.begin, span, numbers);
  if (!job.direct) widen_rows(job, rows, span, spare, spare + kSplit * width, wide);
  for (int64_t h = 0; h < heads; ++h) scale_query(job, work.row, work.kv_head * heads + h, scores, q + h * width);
  Span spans[kQueryRows];
  for (Span& seen : spans) seen = span;
  for (int64_t h = 0; h < heads; h += kQueryRows) {
    const int num_rows = heads - h < kQueryRows ? int(heads - h) : kQueryRows;
    const SoftmaxState to = at_row(work.to, h, width);
    if (job.direct) {
      attend_some(num_rows, job, q + h * width, rows, numbers, spans, scores, to);
    } else {
      attend_some(num_rows, job, q + h * width, wide, numbers, spans, scores, to);
    }
  }
}

void attend_split(const AttentionJob& job, const SplitWork& work) {
  with_row_type(job.cache.format, [&](auto type) { attend_split_of<typename decltype(type)::Element>(job, work); });
}

// Splits one after the other into the first, then the quotient to out. spare: [width].
void merge_splits(const AttentionJob& job, int64_t row, int64_t kv_head, const SoftmaxState* splits, int64_t count,
                  float* spare) {
  const int64_t width = job.width;
  for (int64_t h = 0; h < job.heads_per_kv; ++h) {
    const SoftmaxState state = at_row(splits[0], h, width);
    for (int64_t s = 1; s < count; ++s) merge_row(*state.largest, *state.sum, state.values, splits[s], h, width);
    write_row(job, row, kv_head * job.heads_per_kv + h, state, spare);
  }
}

// Rows of a chunk are (token, head) pairs, heads fastest. scratch: queries [rows][width]; running largest and sum [rows] and
// values [rows][width]; keys and values [kSplit][width]; scores [kQueryRows][kSplit]; a fresh state for kQueryRows rows.
struct ChunkRows {
  float* q;
  SoftmaxState state;
  float* keys;
  float* values;
  float* scores;
  SoftmaxState fresh;
};

ChunkRows lay_out(const AttentionJob& job, const ChunkWork& work) {
  const int64_t width = job.width, total = work.num_rows * job.heads_per_kv;
  ChunkRows rows;
  rows.q = work.scratch;
  rows.state = {rows.q + total * width, rows.q + total * (width + 1), rows.q + total * (width + 2)};
  rows.keys = rows.state.values + total * width;
  rows.values = rows.keys + kSplit * width;
  rows.scores = rows.values + kSplit * width;
  float* spare = rows.scores + kQueryRows * kSplit;
  rows.fresh = {spare, spare + kQueryRows, spare + 2 * kQueryRows};
  for (int64_t r = 0; r < total; ++r) {
    const int64_t head = work.kv_head * job.heads_per_kv + r % job.heads_per_kv;
    scale_query(job, work.row + r / job.heads_per_kv, head, rows.scores, rows.q + r * width);
    rows.state.largest[r] = kNothing;
    rows.state.sum[r] = 0.0f;
  }
  for (int64_t d = 0; d < total * width; d += W) store(rows.state.values + d, zero());
  return rows;
}

QSERVE_INLINE int64_t first_seen(const AttentionJob& job, int64_t position) {
  return position < job.scoring.window ? 0 : position - job.scoring.window + 1;
}

// The rows of a chunk over the positions [begin, end) of a split, widened.
void attend_chunk_split(const AttentionJob& job, const ChunkWork& work, int64_t begin, int64_t end,
                        const SplitRows<float>& wide, const SplitNumbers& numbers, const ChunkRows& rows) {
  const int64_t width = job.width, heads = job.heads_per_kv;
  int64_t first = begin > work.first_position ? begin - work.first_position : 0, last = work.num_rows;  // tokens
  while (last > first && first_seen(job, work.first_position + last - 1) >= end) --last;
  for (int64_t r = first * heads; r < last * heads; r += kQueryRows) {
    const int num_rows = last * heads - r < kQueryRows ? int(last * heads - r) : kQueryRows;
    Span spans[kQueryRows];
    for (int i = 0; i < num_rows; ++i) {
      const int64_t position = work.first_position + (r + i) / heads, from = first_seen(job, position);
      spans[i] = {(from > begin ? from : begin) - begin, (position + 1 < end ? position + 1 : end) - begin};
    }
    attend_some(num_rows, job, rows.q + r * width, wide, numbers, spans, rows.scores, rows.fresh);
    for (int i = 0; i < num_rows; ++i) {
      const SoftmaxState row = at_row(rows.state, r + i, width);
      merge_row(*row.largest, *row.sum, row.values, rows.fresh, i, width);
    }
  }
}

template <typename T>
void attend_chunk_of(const AttentionJob& job, const ChunkWork& work) {
  const int64_t heads = job.heads_per_kv, positions = work.first_position + work.num_rows;
  const int64_t from = first_seen(job, work.first_position);
  const ChunkRows rows = lay_out(job, work);
  SplitRows<T> stored;
  SplitRows<float> wide;
  SplitNumbers numbers;
  for (int64_t begin = from / kSplit * kSplit; begin < positions; begin += kSplit) {
    const int64_t end = begin + kSplit < positions ? begin + kSplit : positions;
    const Span span{from > begin ? from - begin : 0, end - begin};
    find_rows(job.cache, work.blocks, work.kv_head, begin, span, stored);
    find_numbers(job.cache, work.blocks, work.kv_head, begin, span, numbers);
    widen_rows(job, stored, span, rows.keys, rows.values, wide);
    attend_chunk_split(job, work, begin, end, wide, numbers, rows);
  }
  for (int64_t r = 0; r < work.num_rows * heads; ++r)
    write_row(job, work.row + r / heads, work.kv_head * heads + r % heads, at_row(rows.state, r, job.width), rows.scores);
}

void attend_chunk(const AttentionJob& job, const ChunkWork& work) {
  with_row_type(job.cache.format, [&](auto type) { attend_chunk_of<typename decltype(type)::Element>(job, work); });
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
