// Rotation of queries and keys, and the store of keys and values into the cache.
#pragma once

#include "attention_kernels.h"
#include "simd.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

QSERVE_INLINE void rotate(float* head, const float* cos_sin, int64_t half) {
  for (int64_t i = 0; i < half; i += W) {
    const int count = half - i < W ? int(half - i) : W;
    const F first = load_part(head + i, count), second = load_part(head + half + i, count);
    const F cosine = load_part(cos_sin + i, count), sine = load_part(cos_sin + half + i, count);
    store_part(head + i, fnma(second, sine, mul(first, cosine)), count);
    store_part(head + half + i, fma(first, sine, mul(second, cosine)), count);
  }
}

template <typename T>
QSERVE_INLINE void store_head(const float* head, T* to, int64_t width) {
  int64_t i = 0;
  for (; i + W <= width; i += W) store_as(to + i, load(head + i));
  if (i < width) {
    T tail[W];
    store_as(tail, load_part(head + i, int(width - i)));
    for (int64_t j = 0; i + j < width; ++j) to[i + j] = tail[j];
  }
}

template <typename T>
void rope_and_store_of(const RopeJob& job, int64_t begin, int64_t end) {
  const CacheView& cache = job.cache;
  const int64_t width = cache.head_dim;
  for (int64_t token = begin; token < end; ++token) {
    float* row = job.qkv + token * job.stride;
    const float* angles = job.cos_sin + job.positions[token] * width;
    const int64_t rotated = job.num_heads + cache.num_kv_heads;
    for (int64_t h = 0; h < rotated; ++h) rotate(row + h * width, angles, width / 2);
    const int64_t slot = job.slots[token];
    if (slot < 0) continue;
    const int64_t block = slot / cache.block_size, offset = slot % cache.block_size;
    for (int64_t h = 0; h < cache.num_kv_heads; ++h) {
      const int64_t at = ((block * cache.num_kv_heads + h) * cache.block_size + offset) * width;
      const float* key = row + (job.num_heads + h) * width;
      store_head(key, static_cast<T*>(cache.k) + at, width);
      store_head(key + cache.num_kv_heads * width, static_cast<T*>(cache.v) + at, width);
    }
  }
}

void rope_and_store(const RopeJob& job, int64_t begin, int64_t end) {
  switch (job.cache.type) {
    case FloatType::kFloat32:
      return rope_and_store_of<float>(job, begin, end);
    case FloatType::kFloat16:
      return rope_and_store_of<Half>(job, begin, end);
    case FloatType::kBfloat16:
      return rope_and_store_of<Bfloat>(job, begin, end);
  }
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
