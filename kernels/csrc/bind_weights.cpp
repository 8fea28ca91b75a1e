#include "bind.h"
#include "matmul.h"

namespace nb = nanobind;

namespace qserve {
namespace {

struct Int4Weight : PanelWeight {
  Int4Weight(int64_t n, int64_t k, int64_t group, bool wide) : PanelWeight(4, n, k, group, wide) {}
};

struct Int8Weight : PanelWeight {
  Int8Weight(int64_t n, int64_t k, int64_t group, bool wide) : PanelWeight(8, n, k, group, wide) {}
};

void multiply(const Weight& weight, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t out, int64_t out_stride,
              bool quantized) {
  const Product product{.x = at<const float>(x),
                        .x_stride = x_stride,
                        .rows = rows,
                        .out = at<float>(out),
                        .out_stride = out_stride,
                        .quantized = quantized};
  Program::run_or_note([=, &weight] { weight.multiply(product); });
}

}  // namespace

void bind_weights(nb::module_& m) {
  m.def(
      "checksum", [](uintptr_t data, size_t bytes) { return checksum(at<const uint8_t>(data), bytes); }, Released());
  nb::class_<PackedWeight>(m, "PackedWeight")
      .def_prop_ro("nbytes", &PackedWeight::nbytes)
      .def_prop_ro("address", [](const PackedWeight& w) { return reinterpret_cast<uintptr_t>(w.data()); })
      .def("allocate", [](PackedWeight& w) { return reinterpret_cast<uintptr_t>(w.allocate()); })
      .def("attach", [](PackedWeight& w, uintptr_t data) { w.attach(at<uint8_t>(data)); });
  nb::class_<Weight, PackedWeight>(m, "Weight")
      .def("run", &multiply, Released());
  nb::class_<Int4Weight, Weight>(m, "Int4Weight")
      .def(nb::init<int64_t, int64_t, int64_t, bool>())
      .def(
          "pack",
          [](Int4Weight& w, uintptr_t codes, uintptr_t scales, uintptr_t zero_points) {
            w.pack(at<const uint8_t>(codes), at<const float>(scales), at<const uint8_t>(zero_points));
          },
          Released());
  nb::class_<Int8Weight, Weight>(m, "Int8Weight")
      .def(nb::init<int64_t, int64_t, int64_t, bool>())
      .def(
          "pack",
          [](Int8Weight& w, uintptr_t codes, uintptr_t scales) {
            w.pack(at<const uint8_t>(codes), at<const float>(scales), nullptr);
          },
          Released());
  nb::enum_<FloatType>(m, "FloatType")
      .value("FLOAT32", FloatType::kFloat32)
      .value("FLOAT16", FloatType::kFloat16)
      .value("BFLOAT16", FloatType::kBfloat16);
  nb::class_<DenseWeight, Weight>(m, "DenseWeight")
      .def("__init__", [](DenseWeight* w, int64_t n, int64_t k, int type) { new (w) DenseWeight(n, k, FloatType(type)); })
      .def(
          "pack", [](DenseWeight& w, uintptr_t from) { w.pack(at<const void>(from)); },
          Released());
}

}  // namespace qserve
