#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "pool.h"
#include "sequence_ops.h"

namespace qserve {
namespace {

// Numbers that one thread works through in the time it takes to wake another.
constexpr int64_t kNumbersPerTask = 16'384;

template <typename Job>
void run_rows(const Job& job, int64_t rows, int64_t width, void (*kernel)(const Job&, int64_t, int64_t)) {
  const int64_t rows_per_task = std::max<int64_t>(1, kNumbersPerTask / std::max<int64_t>(1, width));
  run_tasks((rows + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    kernel(job, task * rows_per_task, std::min(rows, (task + 1) * rows_per_task));
  });
}

}  // namespace

void rms_norm(const NormJob& job, int64_t rows) { run_rows(job, rows, job.width, kernels().rms_norm); }

void silu_mul(const SiluJob& job, int64_t rows) { run_rows(job, rows, 2 * job.width, kernels().silu_mul); }

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
  const int64_t width = (job.num_heads + 2 * job.cache.num_kv_heads) * job.cache.head_dim;
  run_rows(job, num_tokens, 2 * width, kernels().rope_and_store);
}

}  // namespace qserve
