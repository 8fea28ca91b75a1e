#include "bind.h"
#include "output_head.h"
#include "sampling.h"

namespace nb = nanobind;

namespace qserve {
namespace {

void run_find_largest(const Weight& weight, uintptr_t x, int64_t x_stride, int64_t rows, int activations, int64_t k,
                      uintptr_t ids, uintptr_t values) {
  const Product product{.x = at<const float>(x),
                        .x_stride = x_stride,
                        .rows = rows,
                        .out = nullptr,
                        .out_stride = 0,
                        .activations = Activations(activations)};
  Program::run_or_note([=, &weight] { find_largest(weight, product, k, at<int64_t>(ids), at<float>(values)); });
}

void run_sample_tokens(uintptr_t logits, int64_t stride, int64_t rows, int64_t vocabulary, uintptr_t temperature, uintptr_t top_k,
                       uintptr_t top_p, uintptr_t min_p, uintptr_t repetition_penalty, uintptr_t frequency_penalty,
                       uintptr_t presence_penalty, uintptr_t uniforms, uintptr_t starts, uintptr_t token_ids, uintptr_t biases,
                       uintptr_t counts, int64_t num_adjustments, uintptr_t tokens) {
  const SamplingJob job{.logits = at<float>(logits),
                        .stride = stride,
                        .rows = rows,
                        .vocabulary = vocabulary,
                        .temperature = at<const float>(temperature),
                        .top_k = at<const int32_t>(top_k),
                        .top_p = at<const float>(top_p),
                        .min_p = at<const float>(min_p),
                        .repetition_penalty = at<const float>(repetition_penalty),
                        .frequency_penalty = at<const float>(frequency_penalty),
                        .presence_penalty = at<const float>(presence_penalty),
                        .uniforms = at<const double>(uniforms),
                        .starts = at<const int32_t>(starts),
                        .token_ids = at<const int32_t>(token_ids),
                        .biases = at<const float>(biases),
                        .counts = at<const int32_t>(counts),
                        .num_adjustments = num_adjustments,
                        .tokens = at<int64_t>(tokens)};
  Program::run_or_note([=] { qserve::sample_tokens(job); });
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.def("find_largest", &run_find_largest, Released());
  m.def("sample_tokens", &run_sample_tokens, Released());
}

}  // namespace qserve
