#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "row_tasks.h"
#include "scratch.h"

namespace qserve {
namespace {

constexpr float kGreedyBelow = 1e-5f;  // a temperature below this divides logits into infinities: the largest is the limit
constexpr int64_t kNoToken = -1;
// Natural logarithm: what is further below the most likely token is 20,000 times less likely. The shortest run of tokens that
// holds a wanted share is looked for among the others first.
constexpr float kNear = 10.0f;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Candidate {
  double weight;
  float logit;
  int32_t id;
};

bool is_more_likely(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// Works on one row at a time; memory is the thread's.
class RowSampler {
 public:
  RowSampler(const SamplingJob& job, int64_t row)
      : job_(job), row_(row), logits_(job.logits + row * job.stride), size_(job.vocabulary),
        num_stretches_((job.vocabulary + kStretch - 1) / kStretch) {
    Pieces pieces(scratch(ScratchUse::kTask, 2 * Pieces::size<float>(num_stretches_) + 2 * Pieces::size<Candidate>(size_)));
    tops_ = pieces.take<float>(num_stretches_);
    sums_ = pieces.take<float>(num_stretches_);
    candidates_ = pieces.take<Candidate>(size_);
    copies_ = pieces.take<Candidate>(size_);
  }

  int64_t sample() {
    if (job_.starts) adjust();
    const float temperature = job_.temperature[row_];
    const bool greedy = temperature < kGreedyBelow;
    scale_ = greedy ? 1.0f : 1.0f / temperature;
    kernels().rows.summarize(
        {.x = logits_, .count = size_, .scale = scale_, .tops = tops_, .sums = greedy ? nullptr : sums_});
    top_ = kernels().rows.largest(tops_, num_stretches_);
    if (!std::isfinite(top_)) return kNoToken;
    if (greedy) return first_of_largest();
    const bool filtered = job_.min_p[row_] > 0.0f || job_.top_p[row_] < 1.0f ||
                          (job_.top_k[row_] > 0 && job_.top_k[row_] < size_);
    return filtered ? draw_filtered() : draw();
  }

 private:
  void adjust() {
    const float repetition = job_.repetition_penalty[row_];
    const float frequency = job_.frequency_penalty[row_], presence = job_.presence_penalty[row_];
    for (int32_t i = job_.starts[row_]; i < job_.starts[row_ + 1]; ++i) {
      float value = logits_[job_.token_ids[i]] + job_.biases[i];
      const int32_t count = job_.counts[i];
      if (count >= 0) value = value > 0.0f ? value / repetition : value * repetition;
      if (count > 0) value -= frequency * float(count) + presence;
      logits_[job_.token_ids[i]] = value;
    }
  }

  int64_t first_of_largest() const {
    const int64_t stretch = std::find(tops_, tops_ + num_stretches_, top_) - tops_;
    return std::find(logits_ + stretch * kStretch, logits_ + size_, top_) - logits_;
  }

  double weigh(float logit) const { return std::exp(double(logit - top_) * double(scale_)); }

  // Weight of a stretch, in units of that of the most likely token.
  double weigh_stretch(int64_t stretch) const {
    return tops_[stretch] == kLowest ? 0.0 : double(sums_[stretch]) * weigh(tops_[stretch]);
  }

  double total_weight() const {
    double total = 0.0;
    for (int64_t s = 0; s < num_stretches_; ++s) total += weigh_stretch(s);
    return total;
  }

  // Where in [0, total) the running sum has to pass.
  double target_in(double total) const { return std::min(job_.uniforms[row_] * total, std::nextafter(total, 0.0)); }

  // From the whole vocabulary: the stretch that the target falls into, then the token in it.
  int64_t draw() const {
    const double target = target_in(total_weight());
    double before = 0.0;
    int64_t hit = -1;
    for (int64_t s = 0; s < num_stretches_; ++s) {
      const double weight = weigh_stretch(s);
      if (weight == 0.0) continue;
      hit = s;
      if (before + weight > target) break;
      before += weight;
    }
    int64_t token = kNoToken;
    for (int64_t i = hit * kStretch; i < std::min((hit + 1) * kStretch, size_); ++i) {
      const double weight = weigh(logits_[i]);
      if (weight == 0.0) continue;
      token = i;  // the last of them if rounding puts the target behind it
      before += weight;
      if (before > target) break;
    }
    return token;
  }

  // The smallest logit that min-p and top-k keep.
  float smallest_kept() {
    const float min_p = job_.min_p[row_];
    const float likely = min_p > 0.0f ? top_ + std::log(min_p) / scale_ : kLowest;
    const int64_t k = job_.top_k[row_];
    if (k <= 0 || k >= size_) return likely;
    // At least k logits are no less than the k-th largest of the stretches' tops, so the k-th largest logit is one of those.
    float bound = kLowest;
    if (k <= num_stretches_) {
      float* ordered = sums_;  // of no more use: what is kept is summed anew
      std::copy_n(tops_, num_stretches_, ordered);
      std::nth_element(ordered, ordered + (k - 1), ordered + num_stretches_, std::greater<float>());
      bound = ordered[k - 1];
    }
    auto* values = reinterpret_cast<float*>(copies_);
    int64_t count = 0;
    for_each_from(std::max(bound, likely), [&](int64_t i) { values[count++] = logits_[i]; });
    if (count < k) return likely;
    std::nth_element(values, values + (k - 1), values + count, std::greater<float>());
    return std::max(likely, values[k - 1]);
  }

  template <typename Function>
  void for_each_from(float smallest, const Function& function) const {
    for (int64_t s = 0; s < num_stretches_; ++s) {
      if (tops_[s] < smallest) continue;
      for (int64_t i = s * kStretch; i < std::min((s + 1) * kStretch, size_); ++i)
        if (logits_[i] >= smallest) function(i);
    }
  }

  // Makes candidates of all tokens from this logit up, in the order of their ids. Returns their weight.
  double collect(float smallest) {
    num_candidates_ = 0;
    double total = 0.0;
    for_each_from(smallest, [&](int64_t i) {
      const double weight = weigh(logits_[i]);
      total += weight;
      candidates_[num_candidates_++] = {weight, logits_[i], int32_t(i)};
    });
    return total;
  }

  int64_t draw_filtered() {
    const float top_p = job_.top_p[row_];
    const bool all = job_.min_p[row_] <= 0.0f && (job_.top_k[row_] <= 0 || job_.top_k[row_] >= size_);
    double total;
    if (all) {  // top-p alone: of a whole vocabulary, few tokens hold most of the weight
      total = total_weight();
      if (collect(top_ - kNear / scale_) < top_p * total) total = collect(kLowest);
    } else {
      total = collect(smallest_kept());
    }
    if (top_p < 1.0f) total = keep_nucleus(top_p * total);
    const double target = target_in(total);
    double mass = 0.0;
    int64_t token = kNoToken;
    for (int64_t i = 0; i < num_candidates_; ++i) {
      if (candidates_[i].weight == 0.0) continue;
      token = candidates_[i].id;
      mass += candidates_[i].weight;
      if (mass > target) break;
    }
    return token;
  }

  // Drops all candidates but the shortest run, most likely first, that weighs `wanted`. Returns what it weighs.
  //
  // The border is found by halving: the more likely half is either enough, or all of it is needed.
  double keep_nucleus(double wanted) {
    std::copy_n(candidates_, num_candidates_, copies_);
    int64_t begin = 0, end = num_candidates_;  // the border is in here; all before begin are needed
    double mass = 0.0;
    while (end - begin > 1) {
      const int64_t middle = begin + (end - begin) / 2;
      std::nth_element(copies_ + begin, copies_ + middle, copies_ + end, is_more_likely);
      double half = 0.0;
      for (int64_t i = begin; i < middle; ++i) half += copies_[i].weight;
      if (mass + half >= wanted) {
        end = middle;
      } else {
        mass += half;
        begin = middle;
      }
    }
    const Candidate border = copies_[begin];
    double total = 0.0;
    int64_t kept = 0;
    for (int64_t i = 0; i < num_candidates_; ++i) {
      if (is_more_likely(border, candidates_[i])) continue;
      total += candidates_[i].weight;
      candidates_[kept++] = candidates_[i];
    }
    num_candidates_ = kept;
    return total;
  }

  const SamplingJob& job_;
  int64_t row_;
  float* logits_;
  int64_t size_, num_stretches_;
  float *tops_, *sums_;
  Candidate *candidates_, *copies_;
  int64_t num_candidates_ = 0;
  float scale_ = 1.0f, top_ = 0.0f;
};

void check_adjustments(const SamplingJob& job) {
  bool rise = job.starts[0] == 0 && job.starts[job.rows] == job.num_adjustments;
  for (int64_t row = 0; row < job.rows; ++row) rise = rise && job.starts[row] <= job.starts[row + 1];
  if (!rise)
    throw std::invalid_argument("starts of adjustments are not in order, expected them to rise from 0 to " +
                                std::to_string(job.num_adjustments));
  for (int64_t i = 0; i < job.num_adjustments; ++i)
    if (job.token_ids[i] < 0 || job.token_ids[i] >= job.vocabulary)
      throw std::invalid_argument("token " + std::to_string(job.token_ids[i]) + " is adjusted, expected 0 to " +
                                  std::to_string(job.vocabulary - 1));
}

}  // namespace

void sample_tokens(const SamplingJob& job) {
  if (job.starts) check_adjustments(job);
  run_rows(job, job.rows, job.vocabulary, +[](const SamplingJob& all, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) all.tokens[row] = RowSampler(all, row).sample();
  });
}

}  // namespace qserve
