#include "bind.h"
#include "experts.h"

namespace nb = nanobind;

namespace qserve {
namespace {

void run_experts(const ExpertGroup& group, uintptr_t x, bool shared_row, uintptr_t ids, int64_t rows, int64_t top_k,
                 uintptr_t out, int64_t out_stride, int activations) {
  const ExpertJob job{.x = at<const float>(x),
                      .shared_row = shared_row,
                      .ids = at<const int32_t>(ids),
                      .rows = rows,
                      .top_k = top_k,
                      .out = at<float>(out),
                      .out_stride = out_stride,
                      .activations = Activations(activations)};
  Program::run_or_note([=, &group] { group.multiply(job); });
}

void run_route_tokens(uintptr_t logits, int64_t stride, int64_t rows, int64_t num_experts, int64_t top_k, bool renormalize,
                      uintptr_t ids, uintptr_t weights) {
  const RoutingJob job{.logits = at<const float>(logits),
                       .stride = stride,
                       .rows = rows,
                       .num_experts = num_experts,
                       .top_k = top_k,
                       .renormalize = renormalize,
                       .ids = at<int32_t>(ids),
                       .weights = at<float>(weights)};
  Program::run_or_note([=] { route_tokens(job); });
}

void run_combine_experts(uintptr_t x, uintptr_t weights, uintptr_t out, int64_t out_stride, int64_t rows, int64_t count,
                         int64_t width) {
  const WeightedSumJob job{.x = at<const float>(x),
                           .weights = at<const float>(weights),
                           .out = at<float>(out),
                           .out_stride = out_stride,
                           .count = count,
                           .width = width};
  Program::run_or_note([=] { combine_experts(job, rows); });
}

}  // namespace

void bind_experts(nb::module_& m) {
  nb::class_<ExpertGroup>(m, "ExpertGroup")
      .def(nb::init<>())
      .def("add", &ExpertGroup::add, nb::keep_alive<1, 2>())
      .def("run", &run_experts, Released());
  m.def("route_tokens", &run_route_tokens, Released());
  m.def("combine_experts", &run_combine_experts, Released());
}

}  // namespace qserve
