#include <limits>

#include "bind.h"
#include "sequence_ops.h"

namespace nb = nanobind;

namespace qserve {
namespace {

void run_rope_and_store(uintptr_t qkv, int64_t stride, int64_t num_tokens, int64_t width, uintptr_t positions,
                        uintptr_t slots, uintptr_t cos_sin, int64_t max_positions, int64_t rotary_dim, bool interleaved,
                        const CacheView& cache) {
  const RopeJob job{.qkv = at<float>(qkv),
                    .stride = stride,
                    .num_heads = width / cache.head_dim - 2 * cache.num_kv_heads,
                    .positions = at<const int32_t>(positions),
                    .slots = at<const int32_t>(slots),
                    .cos_sin = at<const float>(cos_sin),
                    .rotary_dim = rotary_dim,
                    .interleaved = interleaved,
                    .cache = cache};
  Program::run_or_note([=] { qserve::rope_and_store(job, num_tokens, max_positions); });
}

// window, soft_cap and sinks: 0 is none.
void run_paged_attention(uintptr_t q, int64_t q_stride, int64_t num_rows, int64_t width, const CacheView& cache,
                         uintptr_t block_tables, int64_t max_blocks, uintptr_t context_lens, uintptr_t starts,
                         int64_t num_sequences, float scale, int64_t window, float soft_cap, uintptr_t sinks,
                         uintptr_t out, int64_t out_stride) {
  constexpr int64_t everything = std::numeric_limits<int64_t>::max();
  const AttentionJob job{.q = at<const float>(q),
                         .q_stride = q_stride,
                         .out = at<float>(out),
                         .out_stride = out_stride,
                         .heads_per_kv = width / cache.head_dim / cache.num_kv_heads,
                         .width = 0,
                         .direct = false,
                         .scoring = {scale, window ? window : everything, soft_cap, at<const float>(sinks)},
                         .cache = cache};
  const RaggedBatch batch{.block_tables = at<const int32_t>(block_tables),
                          .max_blocks = max_blocks,
                          .context_lens = at<const int32_t>(context_lens),
                          .starts = at<const int32_t>(starts),
                          .num_sequences = num_sequences,
                          .num_rows = num_rows};
  Program::run_or_note([=] { qserve::paged_attention(job, batch); });
}

void bind_cache(nb::module_& m) {
  nb::enum_<KvFormat>(m, "KvFormat")
      .value("FLOAT32", KvFormat::kFloat32)
      .value("FLOAT16", KvFormat::kFloat16)
      .value("BFLOAT16", KvFormat::kBfloat16)
      .value("FLOAT8", KvFormat::kFloat8)
      .value("INT8", KvFormat::kInt8)
      .value("INT4", KvFormat::kInt4);
  nb::class_<CacheSide>(m, "CacheSide")
      .def("__init__", [](CacheSide* self, uintptr_t codes, uintptr_t scales, uintptr_t offsets) {
        new (self) CacheSide{at<void>(codes), at<uint16_t>(scales), at<uint16_t>(offsets)};
      });
  nb::class_<CacheView>(m, "LayerCache")
      .def("__init__", [](CacheView* self, const CacheSide& k, const CacheSide& v, int64_t num_blocks,
                          int64_t num_kv_heads, int64_t block_size, int64_t head_dim, KvFormat format) {
        new (self) CacheView{k, v, num_blocks, num_kv_heads, block_size, head_dim, format};
      });
}

}  // namespace

void bind_attention(nb::module_& m) {
  bind_cache(m);
  m.def("rope_and_store", &run_rope_and_store, Released());
  m.def("paged_attention", &run_paged_attention, Released());
}

}  // namespace qserve
