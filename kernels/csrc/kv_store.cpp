#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "row_tasks.h"
#include "scratch.h"
#include "sequence_ops.h"

namespace qserve {

void rope_and_store(const RopeJob& job, int64_t num_tokens, int64_t max_positions) {
  const int64_t num_slots = job.cache.num_blocks * job.cache.block_size;
  for (int64_t i = 0; i < num_tokens; ++i) {
    if (job.positions[i] < 0 || job.positions[i] >= max_positions)
      throw std::invalid_argument("position " + std::to_string(job.positions[i]) + " is outside the table of " +
                                  std::to_string(max_positions));
    if (job.slots[i] >= num_slots)
      throw std::invalid_argument("slot " + std::to_string(job.slots[i]) + " is outside the cache of " +
                                  std::to_string(num_slots));
  }
  const int64_t head_dim = job.cache.head_dim, heads = job.num_heads + 2 * job.cache.num_kv_heads;
  const int64_t tokens_per_task = std::max<int64_t>(1, kNumbersPerTask / (2 * heads * head_dim));
  run_tasks((num_tokens + tokens_per_task - 1) / tokens_per_task, [&](int64_t task) {
    const int64_t begin = task * tokens_per_task, end = std::min(num_tokens, begin + tokens_per_task);
    std::byte* memory = scratch(ScratchUse::kTask, 2 * (head_dim + kWholeRow) * sizeof(float));
    kernels().attention.rope_and_store(job, begin, end, reinterpret_cast<float*>(memory));
  });
}

}  // namespace qserve
