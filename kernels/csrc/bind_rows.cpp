#include "bind.h"
#include "rows.h"

namespace nb = nanobind;

namespace qserve {
namespace {

void run_rms_norm(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, uintptr_t weight, float eps,
              uintptr_t out, int64_t out_stride, int64_t rows, int64_t width) {
  const NormJob job{.x = at<const float>(x),
                            .x_stride = x_stride,
                            .residual = at<float>(residual),
                            .residual_stride = residual_stride,
                            .weight = at<const float>(weight),
                            .eps = eps,
                            .out = at<float>(out),
                            .out_stride = out_stride,
                            .width = width};
  Program::run_or_note([=] { qserve::rms_norm(job, rows); });
}

void run_silu_mul(uintptr_t gate_up, int64_t x_stride, uintptr_t out, int64_t out_stride, int64_t rows, int64_t width) {
  const SiluJob job{.gate_up = at<const float>(gate_up),
                            .x_stride = x_stride,
                            .out = at<float>(out),
                            .out_stride = out_stride,
                            .width = width};
  Program::run_or_note([=] { qserve::silu_mul(job, rows); });
}

}  // namespace

void bind_rows(nb::module_& m) {
  m.def("rms_norm", &run_rms_norm, Released());
  m.def("silu_mul", &run_silu_mul, Released());
}

}  // namespace qserve
