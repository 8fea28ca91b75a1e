// The store into the cache and attention over it, in every format of the cache.
#include "fuzz.h"
#include "sequence_ops.h"

namespace {

using fuzz::Array;
using fuzz::numbers;
using fuzz::Outputs;
using fuzz::Random;
using fuzz::rows_size;
using qserve::KvFormat;

constexpr int64_t kHeadDims[] = {2, 16, 40, 64, 80, 96, 128, 256};

int64_t code_bytes(KvFormat format, int64_t head_dim) {
  if (format == KvFormat::kFloat32) return 4 * head_dim;
  if (format == KvFormat::kFloat16 || format == KvFormat::kBfloat16) return 2 * head_dim;
  return format == KvFormat::kInt4 ? head_dim / 2 : head_dim;
}

// A cache of random codes, in arrays that live as long as this.
struct Cache {
  Cache(Random& random, KvFormat format, int64_t num_blocks, int64_t num_kv_heads, int64_t block_size, int64_t head_dim)
      : tokens(num_blocks * num_kv_heads * block_size), k(make_codes(random, format, head_dim)),
        v(make_codes(random, format, head_dim)), k_scales(make_halves(random)), v_scales(make_halves(random)),
        k_offsets(make_halves(random)), v_offsets(make_halves(random)) {
    const bool scaled = format >= KvFormat::kFloat8, shifted = format == KvFormat::kInt4;
    view = {.k = {k.get(), scaled ? k_scales.get() : nullptr, shifted ? k_offsets.get() : nullptr},
            .v = {v.get(), scaled ? v_scales.get() : nullptr, shifted ? v_offsets.get() : nullptr},
            .num_blocks = num_blocks,
            .num_kv_heads = num_kv_heads,
            .block_size = block_size,
            .head_dim = head_dim,
            .format = format};
  }

  // Bytes that are finite and of moderate size in every format: the highest bits of the exponent are not all set.
  Array<uint8_t> make_codes(Random& random, KvFormat format, int64_t head_dim) const {
    const int64_t width = format == KvFormat::kFloat32 ? 4 : format <= KvFormat::kBfloat16 ? 2 : 1;
    const bool floats = format != KvFormat::kInt8 && format != KvFormat::kInt4;
    return {tokens * code_bytes(format, head_dim), [&](int64_t i) {
              const uint8_t byte = uint8_t(random.bits());
              return floats && i % width == width - 1 ? uint8_t(byte & 0xBF) : byte;
            }};
  }

  // float16 between 2^-4 and 2^-3.
  Array<uint16_t> make_halves(Random& random) const {
    return {tokens, [&](int64_t) { return uint16_t(0x2C00 | (random.bits() & 0x3FF)); }};
  }

  int64_t tokens;
  Array<uint8_t> k, v;
  Array<uint16_t> k_scales, v_scales, k_offsets, v_offsets;
  qserve::CacheView view;
};

KvFormat any_format(Random& random) { return KvFormat(random.between(0, 5)); }

Outputs paged_attention(Random& random) {
  const KvFormat format = any_format(random);
  const int64_t head_dim = kHeadDims[random.between(0, 7)], kv_heads = random.between(1, 3), group = random.between(1, 5);
  const int64_t block_size = random.one_of<int64_t>({1, 8, 16, 32}), num_sequences = random.between(1, 4);
  const int64_t longest = random.chance(20) ? 400 : 60;
  std::vector<int64_t> contexts, queries;
  int64_t rows = 0, num_blocks = 0, max_blocks = 0;
  for (int64_t s = 0; s < num_sequences; ++s) {
    contexts.push_back(random.between(1, longest));
    queries.push_back(random.chance(50) ? 1 : random.between(0, std::min<int64_t>(contexts.back(), 40)));
    rows += queries.back();
    const int64_t blocks = (contexts.back() + block_size - 1) / block_size;
    num_blocks += blocks;
    max_blocks = std::max(max_blocks, blocks);
  }
  if (rows == 0) return {};
  const Cache cache(random, format, num_blocks, kv_heads, block_size, head_dim);
  const Array<int32_t> tables(num_sequences * max_blocks), lengths(num_sequences), starts(num_sequences + 1);
  starts[0] = 0;
  for (int64_t s = 0, next = num_blocks; s < num_sequences; ++s) {
    lengths[s] = int32_t(contexts[s]);
    starts[s + 1] = int32_t(starts[s] + queries[s]);
    for (int64_t b = 0; b * block_size < contexts[s]; ++b) tables[s * max_blocks + b] = int32_t(--next);
  }
  const int64_t width = kv_heads * group * head_dim;
  const int64_t q_stride = width + random.between(0, 3), out_stride = width + random.between(0, 3);
  const Array<float> q(rows_size(rows, width, q_stride), [&](int64_t) { return float(random.uniform() * 4 - 2); });
  const Array<float> out(rows_size(rows, width, out_stride)), sinks = numbers(random, kv_heads * group);
  const int64_t everything = std::numeric_limits<int64_t>::max();
  qserve::paged_attention({.q = q.get(),
                           .q_stride = q_stride,
                           .out = out.get(),
                           .out_stride = out_stride,
                           .heads_per_kv = group,
                           .width = 0,
                           .direct = false,
                           .scoring = {.scale = 1.0f / std::sqrt(float(head_dim)),
                                       .window = random.chance(30) ? random.between(1, 200) : everything,
                                       .soft_cap = random.chance(30) ? 30.0f : 0.0f,
                                       .sinks = random.chance(30) ? sinks.get() : nullptr},
                           .cache = cache.view},
                          {.block_tables = tables.get(),
                           .max_blocks = max_blocks,
                           .context_lens = lengths.get(),
                           .starts = starts.get(),
                           .num_sequences = num_sequences,
                           .num_rows = rows});
  Outputs found{.values = {}, .tolerance = 1e-3f};
  found.add_rows(out, rows, width, out_stride);
  return found;
}

Outputs rope_and_store(Random& random) {
  const KvFormat format = any_format(random);
  const int64_t head_dim = kHeadDims[random.between(0, 7)];
  const int64_t kv_heads = random.between(1, 3), heads = kv_heads * random.between(1, 3);
  const int64_t block_size = random.one_of<int64_t>({1, 8, 16});
  const int64_t num_tokens = random.between(1, 40), max_positions = random.between(1, 50);
  const int64_t num_blocks = (num_tokens + block_size - 1) / block_size;
  const Cache cache(random, format, num_blocks, kv_heads, block_size, head_dim);
  const int64_t rotary_dim = 2 * random.between(1, head_dim / 2), width = (heads + 2 * kv_heads) * head_dim;
  const int64_t stride = width + random.between(0, 3);
  const Array<float> qkv = numbers(random, rows_size(num_tokens, width, stride));
  const Array<float> table(max_positions * rotary_dim, [&](int64_t) { return float(random.uniform() * 2 - 1); });
  const Array<int32_t> positions(num_tokens, [&](int64_t) { return int32_t(random.between(0, max_positions - 1)); });
  const Array<int32_t> slots(num_tokens, [&](int64_t i) { return int32_t(random.chance(10) ? -1 : i); });
  qserve::rope_and_store({.qkv = qkv.get(),
                          .stride = stride,
                          .num_heads = heads,
                          .positions = positions.get(),
                          .slots = slots.get(),
                          .cos_sin = table.get(),
                          .rotary_dim = rotary_dim,
                          .interleaved = random.chance(50),
                          .cache = cache.view},
                         num_tokens, max_positions);
  Outputs found;
  found.add_rows(qkv, num_tokens, width, stride);
  return found;
}

}  // namespace

int main(int argc, char** argv) {
  return fuzz::run_all({{"rope_and_store", rope_and_store}, {"paged_attention", paged_attention}}, argc, argv);
}
