#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "pool.h"
#include "scratch.h"
#include "sequence_ops.h"

namespace qserve {
namespace {

// Query tokens of a task: enough to share converted keys, few enough to keep two threads busy with 512.
constexpr int64_t kChunkTokens = 32;
// Multiply-adds below which waking a worker costs more than it brings.
constexpr int64_t kAloneWork = 60'000;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One KV head of one sequence: all its splits (decode), or kChunkTokens of its query tokens.
struct Task {
  int64_t sequence, kv_head, part;
};

int64_t first_seen(const AttentionJob& job, int64_t position) {
  return position - std::min(position, job.scoring.window - 1);
}

// The first split that a decode row over `context` positions sees.
int64_t first_split(const AttentionJob& job, int64_t context) { return first_seen(job, context - 1) / kSplit; }

// What a batch amounts to, found while it is checked.
struct Amount {
  int64_t decode_splits = 0, chunks = 0, work = 0;
};

[[noreturn]] void refuse(int64_t sequence, const std::string& why) {
  throw std::invalid_argument("sequence " + std::to_string(sequence) + " of the batch: " + why);
}

Amount check(const AttentionJob& job, const RaggedBatch& batch) {
  const CacheView& cache = job.cache;
  Amount amount;
  if (batch.starts[0] != 0 || batch.starts[batch.num_sequences] != batch.num_rows)
    throw std::invalid_argument("cu_seqlens_q must begin with 0 and end with the number of rows of q");
  for (int64_t s = 0; s < batch.num_sequences; ++s) {
    const int64_t rows = batch.starts[s + 1] - batch.starts[s], context = batch.context_lens[s];
    if (rows < 0) refuse(s, "cu_seqlens_q falls");
    if (rows == 0) continue;
    if (context < rows) refuse(s, "fewer positions (" + std::to_string(context) + ") than queries");
    const int64_t num_blocks = divide_up(context, cache.block_size);
    if (num_blocks > batch.max_blocks) refuse(s, "its positions do not fit its row of block_tables");
    const int32_t* blocks = batch.block_tables + s * batch.max_blocks;
    const int64_t seen_from = first_seen(job, context - rows);
    for (int64_t b = seen_from / cache.block_size; b < num_blocks; ++b)
      if (blocks[b] < 0 || blocks[b] >= cache.num_blocks)
        refuse(s, "block " + std::to_string(blocks[b]) + " is outside the cache");
    if (rows == 1) {
      amount.decode_splits += (divide_up(context, kSplit) - first_split(job, context)) * cache.num_kv_heads;
    } else {
      amount.chunks += divide_up(rows, kChunkTokens) * cache.num_kv_heads;
    }
    amount.work += rows * (context - seen_from) * job.heads_per_kv * cache.num_kv_heads * cache.head_dim;
  }
  return amount;
}

class Attention {
 public:
  Attention(const AttentionJob& job, const RaggedBatch& batch, const Amount& amount)
      : job_(job), batch_(batch), amount_(amount), table_(kernels().attention), heads_(job.heads_per_kv),
        width_(job.width) {
    const int64_t rows = amount.decode_splits * heads_;
    Pieces pieces(scratch(ScratchUse::kCall, Pieces::size<Task>(amount.chunks) + Pieces::size<Task>(amount.decode_splits) +
                                                 Pieces::size<SoftmaxState>(amount.decode_splits) +
                                                 Pieces::size<float>(rows * (width_ + 2))));
    chunks_ = pieces.take<Task>(amount.chunks);
    splits_ = pieces.take<Task>(amount.decode_splits);
    states_ = pieces.take<SoftmaxState>(amount.decode_splits);
    float* numbers = pieces.take<float>(rows * (width_ + 2));
    for (int64_t i = 0; i < amount.decode_splits; ++i) {
      states_[i] = {numbers, numbers + heads_, numbers + 2 * heads_};
      numbers += heads_ * (width_ + 2);
    }
    list_tasks();
  }

  void run() {
    const int64_t tasks = amount_.chunks + amount_.decode_splits;
    const auto one = [this](int64_t i) { i < amount_.chunks ? attend_chunk(i) : attend_split(i - amount_.chunks); };
    if (amount_.work < kAloneWork) {
      for (int64_t i = 0; i < tasks; ++i) one(i);
    } else {
      run_tasks(tasks, one);
    }
    for (int64_t i = 0; i < amount_.decode_splits;) i += merge(i);
  }

 private:
  // Chunks first and the longest of a prompt (its end) before the rest: the small tasks fill the gaps.
  void list_tasks() {
    int64_t chunk = 0, split = 0;
    for (int64_t s = 0; s < batch_.num_sequences; ++s) {
      const int64_t rows = batch_.starts[s + 1] - batch_.starts[s];
      for (int64_t part = divide_up(rows, kChunkTokens) - 1; rows > 1 && part >= 0; --part)
        for (int64_t h = 0; h < job_.cache.num_kv_heads; ++h) chunks_[chunk++] = {s, h, part};
      for (int64_t h = 0; rows == 1 && h < job_.cache.num_kv_heads; ++h)
        for (int64_t part = 0; part < num_splits(s); ++part) splits_[split++] = {s, h, part};
    }
  }

  int64_t num_splits(int64_t sequence) const {
    const int64_t context = batch_.context_lens[sequence];
    return divide_up(context, kSplit) - first_split(job_, context);
  }

  const int32_t* blocks(int64_t sequence) const { return batch_.block_tables + sequence * batch_.max_blocks; }

  void attend_split(int64_t index) const {
    const Task& task = splits_[index];
    const int64_t context = batch_.context_lens[task.sequence];
    const int64_t begin = (first_split(job_, context) + task.part) * kSplit;
    const size_t numbers = (heads_ + 1) * width_ + kRowBlock * kSplit + (job_.direct ? 0 : 2 * kSplit * width_);
    table_.attend_split(job_, {.blocks = blocks(task.sequence),
                               .kv_head = task.kv_head,
                               .row = batch_.starts[task.sequence],
                               .begin = begin,
                               .first = std::max(begin, first_seen(job_, context - 1)),
                               .end = std::min(begin + kSplit, context),
                               .to = states_[index],
                               .scratch = task_scratch(numbers)});
  }

  void attend_chunk(int64_t index) const {
    const Task& task = chunks_[index];
    const int64_t first = batch_.starts[task.sequence], rows = batch_.starts[task.sequence + 1] - first;
    const int64_t begin = task.part * kChunkTokens, count = std::min(kChunkTokens, rows - begin);
    const size_t numbers = count * heads_ * (2 * width_ + 2) + 2 * kSplit * width_ + kRowBlock * (kSplit + width_ + 2);
    table_.attend_chunk(job_, {.blocks = blocks(task.sequence),
                               .kv_head = task.kv_head,
                               .row = first + begin,
                               .num_rows = count,
                               .first_position = batch_.context_lens[task.sequence] - rows + begin,
                               .scratch = task_scratch(numbers)});
  }

  // Merges the splits that begin at `index`; returns how many they were.
  int64_t merge(int64_t index) const {
    const Task& task = splits_[index];
    const int64_t count = num_splits(task.sequence);
    table_.merge_splits(job_, batch_.starts[task.sequence], task.kv_head, states_ + index, count, task_scratch(width_));
    return count;
  }

  static float* task_scratch(size_t numbers) {
    return reinterpret_cast<float*>(scratch(ScratchUse::kTask, numbers * sizeof(float)));
  }

  const AttentionJob& job_;
  const RaggedBatch& batch_;
  const Amount& amount_;
  const AttentionKernels& table_;
  const int64_t heads_, width_;
  Task* chunks_;
  Task* splits_;
  SoftmaxState* states_;
};

}  // namespace

void paged_attention(AttentionJob job, const RaggedBatch& batch) {
  job.width = divide_up(job.cache.head_dim, kWholeRow) * kWholeRow;
  // A byte of nibbles holds one element of either half of a row: both must consist of whole vectors.
  job.direct = job.cache.head_dim % (job.cache.format == KvFormat::kInt4 ? 2 * kWholeRow : kWholeRow) == 0;
  const Amount amount = check(job, batch);
  Attention(job, batch, amount).run();
}

}  // namespace qserve
