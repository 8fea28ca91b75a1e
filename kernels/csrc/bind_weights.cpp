#include "bind.h"
#include "matmul.h"

namespace nb = nanobind;

namespace qserve {
namespace {

void multiply(const Weight& weight, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t out, int64_t out_stride,
              int activations) {
  const Product product{.x = at<const float>(x),
                        .x_stride = x_stride,
                        .rows = rows,
                        .out = at<float>(out),
                        .out_stride = out_stride,
                        .activations = Activations(activations)};
  Program::run_or_note([=, &weight] { weight.multiply(product); });
}

void bind_panel_weight(nb::module_& m) {
  nb::class_<PanelWeight, Weight> weight(m, "PanelWeight");
  weight.def("__init__", [](PanelWeight* w, int64_t n, int64_t k, int format, int64_t group, bool wide, bool bias, bool ordered) {
    new (w) PanelWeight(PanelSizes{n, k, PanelFormat(format), group, wide, bias, ordered});
  });
  weight.def(
      "pack",
      [](PanelWeight& w, uintptr_t codes, uintptr_t scales, uintptr_t zero_points, uintptr_t bias, uintptr_t input_order,
         uintptr_t codebook) {
        w.pack({at<const uint8_t>(codes), at<const float>(scales), at<const uint8_t>(zero_points), at<const float>(bias),
                at<const int64_t>(input_order), at<const float>(codebook)});
      },
      Released());
}

void bind_dense_weight(nb::module_& m) {
  nb::class_<DenseWeight, Weight> weight(m, "DenseWeight");
  weight.def("__init__", [](DenseWeight* w, int64_t n, int64_t k, int type, bool bias) {
    new (w) DenseWeight(n, k, FloatType(type), bias);
  });
  weight.def(
      "pack", [](DenseWeight& w, uintptr_t from, uintptr_t bias) { w.pack(at<const void>(from), at<const float>(bias)); },
      Released());
}

}  // namespace

void bind_weights(nb::module_& m) {
  m.def(
      "checksum", [](uintptr_t data, size_t bytes) { return checksum(at<const uint8_t>(data), bytes); }, Released());
  nb::class_<PackedWeight>(m, "PackedWeight")
      .def_prop_ro("nbytes", &PackedWeight::nbytes)
      .def_prop_ro("address", [](const PackedWeight& w) { return reinterpret_cast<uintptr_t>(w.data()); })
      .def("allocate", [](PackedWeight& w) { return reinterpret_cast<uintptr_t>(w.allocate()); });
  nb::class_<Weight, PackedWeight>(m, "Weight").def("run", &multiply, Released());
  bind_panel_weight(m);
  bind_dense_weight(m);
  nb::enum_<FloatType>(m, "FloatType")
      .value("FLOAT32", FloatType::kFloat32)
      .value("FLOAT16", FloatType::kFloat16)
      .value("BFLOAT16", FloatType::kBfloat16);
}

}  // namespace qserve
