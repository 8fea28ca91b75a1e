#include "bind.h"
#include "rows.h"

namespace nb = nanobind;

namespace qserve {
namespace {

void run_rms_norm(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, uintptr_t weight,
                  float weight_offset, float eps, uintptr_t out, int64_t out_stride, int64_t rows, int64_t width) {
  const NormJob job{.x = at<const float>(x),
                    .x_stride = x_stride,
                    .residual = at<float>(residual),
                    .residual_stride = residual_stride,
                    .weight = at<const float>(weight),
                    .weight_offset = weight_offset,
                    .eps = eps,
                    .out = at<float>(out),
                    .out_stride = out_stride,
                    .width = width};
  Program::run_or_note([=] { qserve::rms_norm(job, rows); });
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

}  // namespace

void bind_rows(nb::module_& m) {
  m.def("rms_norm", &run_rms_norm, Released());
  nb::enum_<Gate>(m, "Gate")
      .value("SILU", Gate::kSilu)
      .value("GELU", Gate::kGelu)
      .value("GELU_TANH", Gate::kGeluTanh);
  m.def("gated_activation", &run_gated_activation, Released());
}

}  // namespace qserve
