#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "row_tasks.h"
#include "scratch.h"

namespace qserve {
namespace {

// Rows of one expert that are gathered at a time: bounds the scratch memory; the weight is read again for the next ones.
constexpr int64_t kRowsTogether = 512;

void route_row(const RoutingJob& job, int64_t row) {
  const float* logits = job.logits + row * job.stride;
  int32_t* ids = job.ids + row * job.top_k;
  float* weights = job.weights + row * job.top_k;
  const auto exceeds = [logits](int64_t a, int64_t b) {
    return logits[a] > logits[b] || (std::isnan(logits[a]) && !std::isnan(logits[b]));
  };
  int64_t chosen = 0;  // ids in order, best first; of equals the lowest, since they come in the order of their ids
  for (int64_t expert = 0; expert < job.num_experts; ++expert) {
    int64_t at = chosen;
    if (chosen < job.top_k) {
      ++chosen;
    } else if (!exceeds(expert, ids[--at])) {
      continue;
    }
    for (; at > 0 && exceeds(expert, ids[at - 1]); --at) ids[at] = ids[at - 1];
    ids[at] = int32_t(expert);
  }
  const float top = logits[ids[0]];
  float total = 0.0f, kept = 0.0f;
  for (int64_t expert = 0; expert < job.num_experts; ++expert) total += std::exp(logits[expert] - top);
  for (int64_t j = 0; j < job.top_k; ++j) kept += weights[j] = std::exp(logits[ids[j]] - top);
  for (int64_t j = 0; j < job.top_k; ++j) weights[j] /= job.renormalize ? kept : total;
}

// The places [row * top_k + j] of a batch, those of each expert together; those of expert e begin at starts[e].
struct Grouping {
  int32_t* starts;  // [experts + 1]
  int32_t* places;  // [count]
};

void group_places(const int32_t* ids, int64_t count, int64_t num_experts, const Grouping& to) {
  std::fill_n(to.starts, num_experts + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= num_experts)
      throw std::invalid_argument("expert " + std::to_string(ids[i]) + " is asked for, expected 0 to " +
                                  std::to_string(num_experts - 1));
    ++to.starts[ids[i] + 1];
  }
  for (int64_t e = 0; e < num_experts; ++e) to.starts[e + 1] += to.starts[e];
  for (int64_t i = 0; i < count; ++i) to.places[to.starts[ids[i]]++] = int32_t(i);
  for (int64_t e = num_experts; e > 0; --e) to.starts[e] = to.starts[e - 1];
  to.starts[0] = 0;
}

// Outputs to the places that their rows came from.
class ScatteredRows final : public OutputSink {
 public:
  ScatteredRows(const int32_t* places, float* out, int64_t stride)
      : OutputSink(std::numeric_limits<int64_t>::max()), places_(places), out_(out), stride_(stride) {}

  void take(const OutputPiece& piece) override {
    for (int64_t i = 0; i < piece.num_rows; ++i) {
      float* to = out_ + places_[piece.row + i] * stride_ + piece.column;
      std::memcpy(to, piece.values + i * piece.stride, piece.num_columns * sizeof(float));
    }
  }

 private:
  const int32_t* places_;
  float* out_;
  int64_t stride_;
};

}  // namespace

void route_tokens(const RoutingJob& job) {
  run_rows(job, job.rows, job.num_experts, +[](const RoutingJob& all, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) route_row(all, row);
  });
}

void ExpertGroup::multiply(const ExpertJob& job) const {
  if (experts_.empty()) throw std::invalid_argument("a group without experts cannot multiply");
  const int64_t count = job.rows * job.top_k, num_experts = int64_t(experts_.size());
  const int64_t k = experts_.front()->in_features();
  const int64_t room = std::min(kRowsTogether, count);
  Pieces pieces(scratch(ScratchUse::kOp, Pieces::size<int32_t>(num_experts + 1) + Pieces::size<int32_t>(count) +
                                             Pieces::size<float>(room * k)));
  const Grouping groups{pieces.take<int32_t>(num_experts + 1), pieces.take<int32_t>(count)};
  float* gathered = pieces.take<float>(room * k);
  group_places(job.ids, count, num_experts, groups);
  const auto row_at = [&](int32_t place) { return job.x + (job.shared_row ? place / job.top_k : place) * k; };
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t begin = groups.starts[e], end = groups.starts[e + 1]; begin < end; begin += room) {
      const int32_t* places = groups.places + begin;
      Product product{.x = gathered, .x_stride = k, .rows = std::min(room, end - begin), .activations = job.activations};
      if (product.rows == 1) {
        product.x = row_at(*places);
        product.out = job.out + *places * job.out_stride;
        product.out_stride = job.out_stride;
        experts_[e]->multiply(product);
        continue;
      }
      const int64_t rows_per_task = std::max<int64_t>(1, kNumbersPerTask / k);
      run_tasks((product.rows + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
        const int64_t last = std::min((task + 1) * rows_per_task, product.rows);
        for (int64_t i = task * rows_per_task; i < last; ++i)
          std::memcpy(gathered + i * k, row_at(places[i]), k * sizeof(float));
      });
      ScatteredRows sink(places, job.out, job.out_stride);
      product.sink = &sink;
      experts_[e]->multiply(product);
    }
  }
}

void combine_experts(const WeightedSumJob& job, int64_t rows) {
  run_rows(job, rows, job.count * job.width, kernels().rows.weighted_sum);
}

}  // namespace qserve
