#include "bind.h"
#include "rows.h"

namespace nb = nanobind;

namespace qserve {
namespace {

// What every norm is told.
NormJob norm_job(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, uintptr_t weight, float eps,
                 int64_t width) {
  return {.x = at<const float>(x),
          .x_stride = x_stride,
          .residual = at<float>(residual),
          .residual_stride = residual_stride,
          .weight = at<const float>(weight),
          .weight_offset = 0.0f,
          .eps = eps,
          .out = nullptr,
          .out_stride = 0,
          .width = width};
}

void run_rms_norm(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, uintptr_t weight, float eps,
                  int64_t rows, int64_t width, float weight_offset, uintptr_t out, int64_t out_stride) {
  NormJob job = norm_job(x, x_stride, residual, residual_stride, weight, eps, width);
  job.weight_offset = weight_offset;
  job.out = at<float>(out);
  job.out_stride = out_stride;
  Program::run_or_note([=] { qserve::rms_norm(job, rows); });
}

void run_head_norm(uintptr_t x, int64_t x_stride, uintptr_t weight, float eps, int64_t rows, int64_t heads, int64_t width,
                   float weight_offset, uintptr_t out, int64_t out_stride) {
  NormJob job = norm_job(x, x_stride, 0, 0, weight, eps, width);
  job.weight_offset = weight_offset;
  job.out = at<float>(out);
  job.out_stride = out_stride;
  Program::run_or_note([=] { qserve::head_norm(job, rows, heads); });
}

void run_rms_norm_int8(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, uintptr_t weight, float eps,
                       int64_t rows, int64_t width, float weight_offset, uintptr_t codes, uintptr_t scales) {
  RoundedNormJob job{.norm = norm_job(x, x_stride, residual, residual_stride, weight, eps, width),
                     .codes = at<int8_t>(codes),
                     .scales = at<float>(scales)};
  job.norm.weight_offset = weight_offset;
  Program::run_or_note([=] { qserve::rms_norm_int8(job, rows); });
}

void run_layer_norm(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, uintptr_t weight, float eps,
                    int64_t rows, int64_t width, uintptr_t bias, uintptr_t out, int64_t out_stride) {
  LayerNormJob job{.norm = norm_job(x, x_stride, residual, residual_stride, weight, eps, width), .bias = at<const float>(bias)};
  job.norm.out = at<float>(out);
  job.norm.out_stride = out_stride;
  Program::run_or_note([=] { qserve::layer_norm(job, rows); });
}

void run_gated_activation(uintptr_t gate_up, int64_t x_stride, uintptr_t out, int64_t out_stride, int64_t rows, int64_t width,
                          Gate gate) {
  const GateJob job{.gate_up = at<const float>(gate_up),
                    .x_stride = x_stride,
                    .out = at<float>(out),
                    .out_stride = out_stride,
                    .width = width,
                    .gate = gate};
  Program::run_or_note([=] { qserve::gated_activation(job, rows); });
}

void run_soft_cap(uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride, int64_t rows, int64_t width, float cap) {
  const SoftCapJob job{.x = at<const float>(x),
                       .x_stride = x_stride,
                       .out = at<float>(out),
                       .out_stride = out_stride,
                       .width = width,
                       .cap = cap};
  Program::run_or_note([=] { qserve::soft_cap(job, rows); });
}

}  // namespace

void bind_rows(nb::module_& m) {
  nb::enum_<Gate>(m, "Gate")
      .value("SILU", Gate::kSilu)
      .value("GELU", Gate::kGelu)
      .value("GELU_TANH", Gate::kGeluTanh);
  m.def("rms_norm", &run_rms_norm, Released());
  m.def("head_norm", &run_head_norm, Released());
  m.def("rms_norm_int8", &run_rms_norm_int8, Released());
  m.def("layer_norm", &run_layer_norm, Released());
  m.def("gated_activation", &run_gated_activation, Released());
  m.def("soft_cap", &run_soft_cap, Released());
}

}  // namespace qserve
