// Mixtures of experts: the choice of experts, products with them, and the sum of what they give.
#pragma once

#include <vector>

#include "product.h"
#include "row_kernels.h"

namespace qserve {

// The experts of each row: ids [rows][top_k], most likely first, and the softmax over all experts at them.
struct RoutingJob {
  const float* logits;
  int64_t stride;
  int64_t rows;
  int64_t num_experts;
  int64_t top_k;
  bool renormalize;
  int32_t* ids;
  float* weights;
};

void route_tokens(const RoutingJob& job);

// out [rows][top_k][N] = rows of x times the weights of the experts ids [rows][top_k].
struct ExpertJob {
  const float* x;        // [rows][K], or [rows][top_k][K]
  bool shared_row;       // the first of these: all experts of a row read the same x
  const int32_t* ids;
  int64_t rows;
  int64_t top_k;
  float* out;
  int64_t out_stride;  // from a row to the next, of all rows * top_k
  Activations activations;
};

// The weights of one layer's experts, all of one shape; they must live as long as this.
class ExpertGroup {
 public:
  void add(const Weight& expert) { experts_.push_back(&expert); }

  // Throws std::invalid_argument for an expert that is not there; nothing is computed then.
  void multiply(const ExpertJob& job) const;

 private:
  std::vector<const Weight*> experts_;
};

void combine_experts(const WeightedSumJob& job, int64_t rows);

}  // namespace qserve
