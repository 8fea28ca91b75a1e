// Rotation of queries and keys, and the store of keys and values into the cache.
#pragma once

#include "kv_rows.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

// Elements i and i + half.
QSERVE_INLINE void turn_halves(float* head, const float* cos_sin, int64_t half) {
  for (int64_t i = 0; i < half; i += W) {
    const int count = half - i < W ? int(half - i) : W;
    const F first = load_part(head + i, count), second = load_part(head + half + i, count);
    const F cosine = load_part(cos_sin + i, count), sine = load_part(cos_sin + half + i, count);
    store_part(head + i, fnma(second, sine, mul(first, cosine)), count);
    store_part(head + half + i, fma(first, sine, mul(second, cosine)), count);
  }
}

// Elements 2 i and 2 i + 1: the compiler makes vectors of it.
QSERVE_INLINE void turn_neighbours(float* head, const float* cos_sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[2 * i], second = head[2 * i + 1], cosine = cos_sin[i], sine = cos_sin[half + i];
    head[2 * i] = first * cosine - second * sine;
    head[2 * i + 1] = second * cosine + first * sine;
  }
}

// scratch: two heads in whole vectors.
void rope_and_store(const RopeJob& job, int64_t begin, int64_t end, float* scratch) {
  const CacheView& cache = job.cache;
  const int64_t width = cache.head_dim, heads = cache.num_kv_heads, half = job.rotary_dim / 2;
  for (int64_t token = begin; token < end; ++token) {
    float* row = job.qkv + token * job.stride;
    const float* angles = job.cos_sin + job.positions[token] * job.rotary_dim;
    for (int64_t h = 0; h < job.num_heads + heads; ++h) {
      if (job.interleaved) {
        turn_neighbours(row + h * width, angles, half);
      } else {
        turn_halves(row + h * width, angles, half);
      }
    }
    const int64_t slot = job.slots[token];
    if (slot < 0) continue;
    const int64_t block = slot / cache.block_size, offset = slot % cache.block_size;
    with_row_type(cache.format, [&](auto type) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = (block * heads + h) * cache.block_size + offset;
        const float* key = row + (job.num_heads + h) * width;
        store_row(type, key, width, scratch, cache.k, at);
        store_row(type, key + heads * width, width, scratch, cache.v, at);
      }
    });
  }
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
