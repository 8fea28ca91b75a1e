// Attention of up to four query rows at a time over one split of positions, and the merge of splits.
//
// Decode rows and rows of a prefill chunk go through the same functions in the same order, so a row gets the same bits either
// way: splits begin at multiples of kSplit, each is reduced on its own, and they are merged from the first to the last.
#pragma once

#include "split_rows.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

constexpr float kNothing = -3.0e38f;  // the largest score of a softmax over no position

template <int R>
struct RowVectors {
  F of[R];
};

// Dot products of R queries with N keys: vectors whose lanes, grouped by W / N, still have to be summed.
template <int R, int N, typename T>
QSERVE_INLINE RowVectors<R> score_tree(const float* q, const T* const* keys, int64_t width) {
  RowVectors<R> out;
  if constexpr (N == 1) {
    constexpr int V = kTogether<T>;
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { out.of[r] = zero(); });
    for (int64_t d = 0; d < width; d += V * W) {
      F k[V];
      load_vectors<V>(keys[0], d, k);
      each<V>([&](auto v) QSERVE_INLINE_LAMBDA {
        each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
          out.of[r] = fma(load(q + r * width + d + v * W), k[v], out.of[r]);
        });
      });
    }
  } else {
    const RowVectors<R> first = score_tree<R, N / 2>(q, keys, width);
    const RowVectors<R> second = score_tree<R, N / 2>(q, keys + N / 2, width);
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { out.of[r] = join<N / 2>(first.of[r], second.of[r]); });
  }
  return out;
}

// scores [R][kSplit], whole vectors of positions.
template <int R, typename T>
QSERVE_INLINE void score_rows(const float* q, const T* const* keys, Span all, int64_t width, float* scores) {
  for (int64_t position = all.begin; position < all.end; position += W) {
    const RowVectors<R> found = score_tree<R, W>(q, keys + position, width);
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { store(scores + r * kSplit + position, found.of[r]); });
  }
}

// Dot products with codes become dot products with keys: scale * (q . codes) + offset * sum(q).
QSERVE_INLINE void finish_scores(const AttentionJob& job, const float* q, const RowNumbers& keys, Span all, float* scores) {
  if (job.cache.k.offsets) {
    F sums = zero();
    for (int64_t d = 0; d < job.width; d += W) sums = add(sums, load(q + d));
    const F sum = set1(add_lanes(sums));
    for (int64_t i = all.begin; i < all.end; i += W)
      store(scores + i, fma(load(keys.scales + i), load(scores + i), mul(load(keys.offsets + i), sum)));
  } else if (job.cache.k.scales) {
    for (int64_t i = all.begin; i < all.end; i += W) store(scores + i, mul(load(keys.scales + i), load(scores + i)));
  }
  if (job.scoring.soft_cap == 0.0f) return;
  // c tanh(s / c) = c - 2 c / (e^(2 s / c) + 1)
  const F cap = set1(job.scoring.soft_cap), twice = set1(2.0f * job.scoring.soft_cap);
  const F inverse = set1(2.0f / job.scoring.soft_cap);
  for (int64_t i = all.begin; i < all.end; i += W) {
    const F grown = exp(mul(load(scores + i), inverse));
    store(scores + i, sub(cap, div(twice, add(grown, set1(1.0f)))));
  }
}

// `inside` where a lane's position, the first of which is `position`, is in the span; elsewhere `outside`.
QSERVE_INLINE F select_span(Span span, int64_t position, F inside, F outside) {
  const F before = select_first(span.end > position ? int(span.end - position) : 0, inside, outside);
  return span.begin <= position ? before : select_first(int(span.begin - position), outside, before);
}

// Scores of one row become exponentials, 0 outside the row's span; returns the largest score and the sum.
QSERVE_INLINE void soften(float* scores, Span span, Span all, float& largest, float& sum) {
  F top = set1(scores[span.begin]);
  for (int64_t i = all.begin; i < all.end; i += W) top = max(top, select_span(span, i, load(scores + i), top));
  largest = max_lanes(top);
  const F shift = set1(largest);
  F total = zero();
  for (int64_t i = all.begin; i < all.end; i += W) {
    const F weight = select_span(span, i, exp(sub(load(scores + i), shift)), zero());
    store(scores + i, weight);
    total = add(total, weight);
  }
  sum = add_lanes(total);
}

// Weights of values become weights of their codes; returns what the offsets add to every element.
QSERVE_INLINE float finish_weights(const AttentionJob& job, const RowNumbers& values, Span all, float* weights) {
  if (!job.cache.v.scales) return 0.0f;
  F total = zero();
  for (int64_t i = all.begin; i < all.end; i += W) {
    const F weight = load(weights + i);
    if (job.cache.v.offsets) total = fma(weight, load(values.offsets + i), total);
    store(weights + i, mul(weight, load(values.scales + i)));
  }
  return add_lanes(total);
}

template <int R, int V, typename T>
QSERVE_INLINE void weigh_columns(const float* weights, const float* start, const T* const* values, Span span, int64_t column,
                                 int64_t width, float* out) {
  F acc[R][V];
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA { each<V>([&](auto v) QSERVE_INLINE_LAMBDA { acc[r][v] = set1(start[r]); }); });
  for (int64_t i = span.begin; i < span.end; ++i) {
    F weight[R];
    each<R>([&](auto r) QSERVE_INLINE_LAMBDA { weight[r] = set1(weights[r * kSplit + i]); });
    F loaded[V];
    load_vectors<V>(values[i], column, loaded);
    each<V>([&](auto v) QSERVE_INLINE_LAMBDA {
      each<R>([&](auto r) QSERVE_INLINE_LAMBDA { acc[r][v] = fma(weight[r], loaded[v], acc[r][v]); });
    });
  }
  each<R>([&](auto r) QSERVE_INLINE_LAMBDA {
    each<V>([&](auto v) QSERVE_INLINE_LAMBDA { store(out + r * width + column + v * W, acc[r][v]); });
  });
}

// One split for R rows: q [R][width] as scale_query leaves it, spans[r] the positions of the split that row r sees, at least
// one.
template <int R, typename T>
void attend_rows(const AttentionJob& job, const float* q, const SplitRows<T>& rows, const SplitNumbers& numbers,
                 const Span* spans, float* scores, const SoftmaxState& to) {
  Span span = spans[0];
  for (int r = 1; r < R; ++r) {
    span.begin = spans[r].begin < span.begin ? spans[r].begin : span.begin;
    span.end = spans[r].end > span.end ? spans[r].end : span.end;
  }
  const Span all = whole_vectors(span);
  const int64_t width = job.width;
  score_rows<R>(q, rows.keys, all, width, scores);
  float start[R];
  for (int r = 0; r < R; ++r) {
    float* row = scores + r * kSplit;
    finish_scores(job, q + r * width, numbers.k, all, row);
    soften(row, spans[r], all, to.largest[r], to.sum[r]);
    start[r] = finish_weights(job, numbers.v, all, row);
  }
  constexpr int few = kTogether<T>, many = kColumnVectors > few ? kColumnVectors : few;
  int64_t column = 0;
  for (; column + many * W <= width; column += many * W)
    weigh_columns<R, many>(scores, start, rows.values, span, column, width, to.values);
  for (; column < width; column += few * W)
    weigh_columns<R, few>(scores, start, rows.values, span, column, width, to.values);
}

template <typename T>
void attend_some(int num_rows, const AttentionJob& job, const float* q, const SplitRows<T>& rows,
                 const SplitNumbers& numbers, const Span* spans, float* scores, const SoftmaxState& to) {
  if (num_rows == 1) return attend_rows<1>(job, q, rows, numbers, spans, scores, to);
  if (num_rows == 2) return attend_rows<2>(job, q, rows, numbers, spans, scores, to);
  if constexpr (kQueryRows == 4) {
    if (num_rows == 3) return attend_rows<3>(job, q, rows, numbers, spans, scores, to);
    return attend_rows<4>(job, q, rows, numbers, spans, scores, to);
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

// Scaled, and rotated and in the order of the keys where those are; zero from head_dim on. spare: [width].
QSERVE_INLINE void scale_query(const AttentionJob& job, int64_t row, int64_t head, float* spare, float* to) {
  const int64_t head_dim = job.cache.head_dim;
  const float* q = job.q + row * job.q_stride + head * head_dim;
  const bool arranged = job.cache.format == KvFormat::kInt4 && job.direct;
  float* scaled = arranged ? spare : to;
  for (int64_t d = 0; d < job.width; d += W) {
    const int count = head_dim - d < W ? (head_dim > d ? int(head_dim - d) : 0) : W;
    store(scaled + d, mul(load_part(q + d, count), set1(job.scoring.scale)));
  }
  if (job.cache.format == KvFormat::kInt4) rotate_runs(scaled, head_dim, head_dim & -head_dim);
  if (arranged) arrange(scaled, head_dim, to);
}

// The quotient, back in its order and unrotated. values: [width], overwritten. spare: [width].
QSERVE_INLINE void write_row(const AttentionJob& job, int64_t row, int64_t head, const SoftmaxState& state, float* spare) {
  const int64_t head_dim = job.cache.head_dim;
  float *values = state.values, *out = job.out + row * job.out_stride + head * head_dim;
  float sum = *state.sum, keep = 1.0f;
  if (job.scoring.sinks) {  // one more score, which has no value
    const float sink = job.scoring.sinks[head], top = sink > *state.largest ? sink : *state.largest;
    keep = exp_scalar(*state.largest - top);
    sum = sum * keep + exp_scalar(sink - top);
  }
  for (int64_t d = 0; d < job.width; d += W) store(values + d, div(mul(load(values + d), set1(keep)), set1(sum)));
  if (job.cache.format == KvFormat::kInt4) {
    if (job.direct) {
      restore_order(values, head_dim, spare);
      values = spare;
    }
    rotate_runs(values, head_dim, head_dim & -head_dim);
  }
  for (int64_t d = 0; d < head_dim; d += W) store_part(out + d, load(values + d), head_dim - d < W ? int(head_dim - d) : W);
}

QSERVE_INLINE SoftmaxState at_row(const SoftmaxState& state, int64_t row, int64_t width) {
  return {state.largest + row, state.sum + row, state.values + row * width};
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
