// Where the keys and values of a split lie, with their scales and offsets, and their floats for many query rows.
#pragma once

#include "kv_rows.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

// Positions [begin, end) of a split are seen by some row; both count from its first position.
struct Span {
  int64_t begin, end;
};

template <typename T>
struct SplitRows {
  const T* keys[kSplit];
  const T* values[kSplit];
};

struct RowNumbers {
  float scales[kSplit];
  float offsets[kSplit];
};

struct SplitNumbers {
  RowNumbers k, v;
};

// The vectors that hold a span.
QSERVE_INLINE Span whole_vectors(Span span) { return {span.begin / W * W, (span.end + W - 1) / W * W}; }

// What lies beside the span in its first and last vector is the nearest position of the span: nothing else was surely written.
template <typename Item>
QSERVE_INLINE void repeat_ends(Item* items, Span span) {
  const Span all = whole_vectors(span);
  for (int64_t i = all.begin; i < span.begin; ++i) items[i] = items[span.begin];
  for (int64_t i = span.end; i < all.end; ++i) items[i] = items[span.end - 1];
}

// Calls run(i, row, count) for the `count` positions from i on whose rows lie one after the other from `row` of the cache on.
template <typename Function>
QSERVE_INLINE void each_run(const CacheView& cache, const int32_t* blocks, int64_t kv_head, int64_t begin, Span span,
                            const Function& run) {
  for (int64_t i = span.begin; i < span.end;) {
    const int64_t block = blocks[(begin + i) / cache.block_size], offset = (begin + i) % cache.block_size;
    const int64_t left_in_block = cache.block_size - offset, left = span.end - i;
    const int64_t count = left_in_block < left ? left_in_block : left;
    run(i, (block * cache.num_kv_heads + kv_head) * cache.block_size + offset, count);
    i += count;
  }
}

template <typename T>
void find_rows(const CacheView& cache, const int32_t* blocks, int64_t kv_head, int64_t begin, Span span,
               SplitRows<T>& rows) {
  each_run(cache, blocks, kv_head, begin, span, [&](int64_t i, int64_t row, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      rows.keys[i + j] = row_at<T>(cache.k, cache.head_dim, row + j);
      rows.values[i + j] = row_at<T>(cache.v, cache.head_dim, row + j);
    }
  });
  repeat_ends(rows.keys, span);
  repeat_ends(rows.values, span);
}

// Asks memory for the rows of a span before they are read: they are too many short runs for the machine to foresee. Without it a
// decode step waits for each of them; after 512 positions attention took 1.6 times as long.
template <typename T>
QSERVE_INLINE void fetch_rows(const CacheView& cache, const T* const* rows, Span span) {
  const int64_t bytes = cache.head_dim / kTogether<T> * int64_t(sizeof(T));
  for (int64_t i = span.begin; i < span.end; ++i)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(rows[i]) + at, 0, 2);
}

// unit: what a scale is multiplied by.
QSERVE_INLINE void widen_numbers(const uint16_t* halves, Span span, float unit, float* to) {
  Half gathered[kSplit];
  for (int64_t i = span.begin; i < span.end; ++i) gathered[i].bits = halves[i];
  repeat_ends(gathered, span);
  const Span all = whole_vectors(span);
  for (int64_t i = all.begin; i < all.end; i += W) store(to + i, mul(load_as(gathered + i), set1(unit)));
}

// Scales and offsets of a split, where the format has them.
void find_numbers(const CacheView& cache, const int32_t* blocks, int64_t kv_head, int64_t begin, Span span,
                  SplitNumbers& numbers) {
  if (!cache.k.scales) return;
  const float unit = cache.format == KvFormat::kFloat8 ? kFloat8Unit : 1.0f;
  const auto gather = [&](const uint16_t* from, float scale, float* to) QSERVE_INLINE_LAMBDA {
    uint16_t halves[kSplit];
    each_run(cache, blocks, kv_head, begin, span, [&](int64_t i, int64_t row, int64_t count) {
      for (int64_t j = 0; j < count; ++j) halves[i + j] = from[row + j];
    });
    widen_numbers(halves, span, scale, to);
  };
  gather(cache.k.scales, unit, numbers.k.scales);
  gather(cache.v.scales, unit, numbers.v.scales);
  if (!cache.k.offsets) return;
  gather(cache.k.offsets, 1.0f, numbers.k.offsets);
  gather(cache.v.offsets, 1.0f, numbers.v.offsets);
}

// Nibbles are read W of the first half of a row, then W of the second. An arranged head has that order, natural has the usual.
void arrange(const float* natural, int64_t width, float* arranged) {
  for (int64_t d = 0; d < width / 2; d += W) {
    store(arranged + 2 * d, load(natural + d));
    store(arranged + 2 * d + W, load(natural + width / 2 + d));
  }
}

void restore_order(const float* arranged, int64_t width, float* natural) {
  for (int64_t d = 0; d < width / 2; d += W) {
    store(natural + d, load(arranged + 2 * d));
    store(natural + width / 2 + d, load(arranged + 2 * d + W));
  }
}

// One row as floats, zero from head_dim to width; a row that is not direct comes out in its natural order.
template <typename T>
QSERVE_INLINE void widen_row(const AttentionJob& job, const T* row, float* to) {
  constexpr int V = kTogether<T>;
  const int64_t head_dim = job.cache.head_dim;
  if (job.direct) {
    for (int64_t d = 0; d < head_dim; d += V * W) {
      F loaded[V];
      load_vectors<V>(row, d, loaded);
      each<V>([&](auto v) QSERVE_INLINE_LAMBDA { store(to + d + v * W, loaded[v]); });
    }
    return;
  }
  const int64_t stored = head_dim / V;  // elements of T; of nibbles each holds one of either half
  for (int64_t d = 0; d < stored; d += W) {
    const int count = stored - d < W ? int(stored - d) : W;
    T part[W] = {};
    copy_elements(row + d, part, count);
    F loaded[V];
    load_vectors<V>(part, 0, loaded);
    each<V>([&](auto v) QSERVE_INLINE_LAMBDA { store_part(to + v * stored + d, loaded[v], count); });
  }
  for (int64_t d = head_dim; d < job.width; ++d) to[d] = 0.0f;
}

// Keys and values of a span as floats [kSplit][width] each: once for all rows of a chunk, or because rows are not direct.
template <typename T>
void widen_rows(const AttentionJob& job, const SplitRows<T>& rows, Span span, float* keys, float* values,
                SplitRows<float>& wide) {
  for (int64_t i = span.begin; i < span.end; ++i) {
    wide.keys[i] = keys + i * job.width;
    wide.values[i] = values + i * job.width;
    widen_row(job, rows.keys[i], keys + i * job.width);
    widen_row(job, rows.values[i], values + i * job.width);
  }
  repeat_ends(wide.keys, span);
  repeat_ends(wide.values, span);
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
