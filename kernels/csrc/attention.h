// Attention of up to four query rows at a time over one split of positions, and the merge of splits.
//
// Decode rows and rows of a prefill chunk go through the same functions in the same order, so a row gets the same bits either
// way: splits begin at multiples of kSplit, each is reduced on its own, and they are merged from the first to the last.
#pragma once

#include "attention_kernels.h"
#include "simd.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

template <typename T>
struct SplitRows {
  const T* keys[kSplit];
  const T* values[kSplit];
};

// Where the positions [begin, end) of a sequence lie; the last one again up to a whole vector.
template <typename T>
void find_rows(const CacheView& cache, const int32_t* blocks, int64_t kv_head, int64_t begin, int64_t end,
               SplitRows<T>& rows) {
  for (int64_t position = begin; position < end;) {
    const int64_t block = blocks[position / cache.block_size], offset = position % cache.block_size;
    const int64_t at = ((block * cache.num_kv_heads + kv_head) * cache.block_size + offset) * cache.head_dim;
    const int64_t left_in_block = cache.block_size - offset, left = end - position;
    const int64_t run = left_in_block < left ? left_in_block : left;
    for (int64_t i = 0; i < run; ++i) {
      rows.keys[position - begin + i] = static_cast<const T*>(cache.k) + at + i * cache.head_dim;
      rows.values[position - begin + i] = static_cast<const T*>(cache.v) + at + i * cache.head_dim;
    }
    position += run;
  }
  for (int64_t i = end - begin; i % W != 0; ++i) {
    rows.keys[i] = rows.keys[i - 1];
    rows.values[i] = rows.values[i - 1];
  }
}

template <int R>
struct RowVectors {
  F of[R];
};

// Dot products of R queries with N keys: vectors whose lanes, grouped by W / N, still have to be summed.
template <int R, int N, typename T>
QSERVE_INLINE RowVectors<R> score_tree(const float* q, const T* const* keys, int64_t width) {
  RowVectors<R> out;
  if constexpr (N == 1) {
    const T* key = keys[0];
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { out.of[r] = zero(); });
    for (int64_t d = 0; d < width; d += W) {
      const F k = load_as(key + d);
      each<R>([&](auto r) QSERVE_INLINE_LAMBDA { out.of[r] = fma(load(q + r * width + d), k, out.of[r]); });
    }
  } else {
    const RowVectors<R> first = score_tree<R, N / 2>(q, keys, width);
    const RowVectors<R> second = score_tree<R, N / 2>(q, keys + N / 2, width);
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { out.of[r] = join<N / 2>(first.of[r], second.of[r]); });
  }
  return out;
}

// scores [R][kSplit], up to a whole vector of positions.
template <int R, typename T>
QSERVE_INLINE void score_rows(const float* q, const T* const* keys, int64_t count, int64_t width, float* scores) {
  for (int64_t position = 0; position < count; position += W) {
    const RowVectors<R> found = score_tree<R, W>(q, keys + position, width);
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { store(scores + r * kSplit + position, found.of[r]); });
  }
}

// Scores of one row become exponentials, 0 from `seen` to `count`; returns the largest score and the sum.
QSERVE_INLINE void soften(float* scores, int64_t seen, int64_t count, float& largest, float& sum) {
  F top = set1(scores[0]);
  for (int64_t i = 0; i < seen; i += W) top = max(top, select_first(int(seen - i), load(scores + i), top));
  largest = max_lanes(top);
  const F shift = set1(largest);
  F total = zero();
  for (int64_t i = 0; i < count; i += W) {
    const F weight = select_first(seen > i ? int(seen - i) : 0, exp(sub(load(scores + i), shift)), zero());
    store(scores + i, weight);
    total = add(total, weight);
  }
  sum = add_lanes(total);
}

template <int R, int V, typename T>
QSERVE_INLINE void weigh_columns(const float* weights, const T* const* values, int64_t count, int64_t column,
                                 int64_t width, float* out) {
  F acc[R][V];
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA { each<V>([&](auto v) QSERVE_INLINE_LAMBDA { acc[r][v] = zero(); }); });
  for (int64_t i = 0; i < count; ++i) {
    const T* value = values[i] + column;
    F weight[R];
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { weight[r] = set1(weights[r * kSplit + i]); });
    each<V>([&](auto v) QSERVE_INLINE_LAMBDA {
      const F loaded = load_as(value + v * W);
      each<R>([&](auto r) QSERVE_INLINE_LAMBDA { acc[r][v] = fma(weight[r], loaded, acc[r][v]); });
    });
  }
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
    each<V>([&](auto v) QSERVE_INLINE_LAMBDA { store(out + r * width + column + v * W, acc[r][v]); });
  });
}

// One split for R rows: q [R][width] scaled, seen[r] the positions of the split that row r sees (at least one).
template <int R, typename T>
void attend_rows(const float* q, const SplitRows<T>& rows, const int64_t* seen, int64_t width, float* scores,
                 const SoftmaxState& to) {
  int64_t count = 0;
  for (int r = 0; r < R; ++r) count = seen[r] > count ? seen[r] : count;
  score_rows<R>(q, rows.keys, count, width, scores);
  for (int r = 0; r < R; ++r) soften(scores + r * kSplit, seen[r], count, to.largest[r], to.sum[r]);
  int64_t column = 0;
  for (; column + kColumnVectors * W <= width; column += kColumnVectors * W)
    weigh_columns<R, kColumnVectors>(scores, rows.values, count, column, width, to.values);
  for (; column < width; column += W) weigh_columns<R, 1>(scores, rows.values, count, column, width, to.values);
}

template <typename T>
void attend_some(int num_rows, const float* q, const SplitRows<T>& rows, const int64_t* seen, int64_t width,
                 float* scores, const SoftmaxState& to) {
  if (num_rows == 1) return attend_rows<1>(q, rows, seen, width, scores, to);
  if (num_rows == 2) return attend_rows<2>(q, rows, seen, width, scores, to);
  if constexpr (kQueryRows == 4) {
    if (num_rows == 3) return attend_rows<3>(q, rows, seen, width, scores, to);
    return attend_rows<4>(q, rows, seen, width, scores, to);
  }
}

QSERVE_INLINE float exp_scalar(float x) {
  alignas(64) float lanes[W];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

// Row `r` of `next` into the running state of a row: the online softmax of Milakov and Gimelshein (2018), section 3.
QSERVE_INLINE void merge_row(float& largest, float& sum, float* values, const SoftmaxState& next, int64_t r,
                             int64_t width) {
  const float top = next.largest[r] > largest ? next.largest[r] : largest;
  const float keep = exp_scalar(largest - top), bring = exp_scalar(next.largest[r] - top);
  sum = sum * keep + next.sum[r] * bring;
  const float* from = next.values + r * width;
  for (int64_t d = 0; d < width; d += W)
    store(values + d, fma(load(values + d), set1(keep), mul(load(from + d), set1(bring))));
  largest = top;
}

QSERVE_INLINE void scale_query(const AttentionJob& job, int64_t row, int64_t head, float* to) {
  const int64_t width = job.cache.head_dim;
  const float* q = job.q + row * job.q_stride + head * width;
  for (int64_t d = 0; d < width; d += W) store(to + d, mul(load(q + d), set1(job.scale)));
}

QSERVE_INLINE void write_row(const AttentionJob& job, int64_t row, int64_t head, const float* values, float sum) {
  const int64_t width = job.cache.head_dim;
  float* out = job.out + row * job.out_stride + head * width;
  for (int64_t d = 0; d < width; d += W) store(out + d, div(load(values + d), set1(sum)));
}

QSERVE_INLINE SoftmaxState at_row(const SoftmaxState& state, int64_t row, int64_t width) {
  return {state.largest + row, state.sum + row, state.values + row * width};
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
