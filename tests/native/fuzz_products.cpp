// Products with weights of every format, the largest logits of an output head, and mixtures of experts.
#include "experts.h"
#include "fuzz.h"
#include "matmul.h"
#include "output_head.h"

namespace {

using fuzz::Array;
using fuzz::numbers;
using fuzz::Outputs;
using fuzz::Random;
using fuzz::rows_size;
using qserve::Activations;
using qserve::PanelFormat;

// What the codes of a format can be.
uint8_t any_code(Random& random, PanelFormat format) {
  switch (format) {
    case PanelFormat::kInt2: return uint8_t(random.between(0, 3));
    case PanelFormat::kInt3: return uint8_t(random.between(0, 7));
    case PanelFormat::kInt4:
    case PanelFormat::kCodebook: return uint8_t(random.between(0, 15));
    case PanelFormat::kInt8: return uint8_t(random.between(1, 255));
    case PanelFormat::kFloat8: return uint8_t(random.bits() & 0xBF);  // below 2, and never NaN
    default: return uint8_t(random.between(0, 255));
  }
}

// A weight of codes, made of arrays that are gone afterwards.
std::unique_ptr<qserve::Weight> make_panels(Random& random, PanelFormat format, int64_t n, int64_t k) {
  const int64_t group = random.chance(20) ? k : 32 * random.between(1, 4);
  const int64_t groups = n * ((k + group - 1) / group);
  const qserve::PanelSizes sizes{n, k, format, group, random.chance(30), random.chance(30), random.chance(30)};
  const Array<uint8_t> codes(n * k, [&](int64_t) { return any_code(random, format); });
  const Array<uint8_t> zeros(groups, [&](int64_t) { return any_code(random, format); });
  // Values of float16, which scales are kept in unless they are wide.
  const Array<float> scales(groups, [&](int64_t) { return float(random.between(1, 64)) / 1024; });
  const Array<float> bias = numbers(random, n);
  const Array<float> codebook(16, [&](int64_t) { return float(random.between(-127, 127)); });
  const Array<int64_t> order(k, [&](int64_t i) { return k - 1 - i; });
  auto weight = std::make_unique<qserve::PanelWeight>(sizes);
  weight->pack({.codes = codes.get(),
                .scales = scales.get(),
                .zero_points = zeros.get(),
                .bias = sizes.bias ? bias.get() : nullptr,
                .input_order = sizes.ordered ? order.get() : nullptr,
                .codebook = codebook.get()});
  return weight;
}

std::unique_ptr<qserve::Weight> make_dense(Random& random, int64_t n, int64_t k) {
  const auto type = qserve::FloatType(random.between(0, 2));
  const Array<float> wide = numbers(random, n * k), bias = numbers(random, n);
  // 16 bits whose exponent is not all ones: below 2 in float16, whatever in bfloat16 is at most as large.
  const Array<uint16_t> narrow(n * k, [&](int64_t) { return uint16_t(random.bits() & 0xBFFF); });
  const bool has_bias = random.chance(30);
  auto weight = std::make_unique<qserve::DenseWeight>(n, k, type, has_bias);
  const void* values = type == qserve::FloatType::kFloat32 ? static_cast<const void*>(wide.get()) : narrow.get();
  weight->pack(values, has_bias ? bias.get() : nullptr);
  return weight;
}

PanelFormat any_format(Random& random) { return PanelFormat(random.between(0, qserve::kPanelFormats - 1)); }

Activations any_activations(Random& random, PanelFormat format) {
  if (format == PanelFormat::kFloat8) return random.one_of({Activations::kFloat32, Activations::kFloat8Token});
  return Activations(random.between(0, 3));
}

Outputs multiply(Random& random, const qserve::Weight& weight, Activations activations) {
  const int64_t n = weight.out_features(), k = weight.in_features(), rows = random.between(1, 20);
  const int64_t x_stride = k + random.between(0, 5), out_stride = n + random.between(0, 5);
  const Array<float> x = numbers(random, rows_size(rows, k, x_stride)), out(rows_size(rows, n, out_stride));
  weight.multiply({.x = x.get(),
                   .x_stride = x_stride,
                   .rows = rows,
                   .out = out.get(),
                   .out_stride = out_stride,
                   .activations = activations});
  Outputs found;
  found.add_rows(out, rows, n, out_stride);
  return found;
}

Outputs panel_product(Random& random, PanelFormat format) {
  const int64_t n = random.between(1, 100), k = random.between(1, 300);
  const Activations activations = any_activations(random, format);
  return multiply(random, *make_panels(random, format, n, k), activations);
}

fuzz::Op panel_op(const char* name, PanelFormat format) {
  return {name, [format](Random& random) { return panel_product(random, format); }};
}

Outputs dense_product(Random& random) {
  const int64_t n = random.between(1, 100), k = random.between(1, 300);
  return multiply(random, *make_dense(random, n, k), Activations::kFloat32);
}

Outputs output_head(Random& random) {
  const int64_t n = random.between(1, 600), k = random.between(1, 150), rows = random.between(1, 12);
  const PanelFormat format = any_format(random);
  const bool dense = random.chance(30);
  const auto weight = dense ? make_dense(random, n, k) : make_panels(random, format, n, k);
  const Activations activations = dense ? Activations::kFloat32 : any_activations(random, format);
  const int64_t count = random.between(1, std::min<int64_t>(n, 20)), x_stride = k + random.between(0, 5);
  const Array<float> x = numbers(random, rows_size(rows, k, x_stride)), values(rows * count);
  const Array<int64_t> ids(rows * count);
  qserve::find_largest(*weight,
                       {.x = x.get(),
                        .x_stride = x_stride,
                        .rows = rows,
                        .out = nullptr,
                        .out_stride = 0,
                        .activations = activations},
                       count, ids.get(), values.get());
  Outputs found;
  found.add_rows(values, rows, count, count);
  for (int64_t i = 0; i < ids.count(); ++i)
    if (ids[i] < 0 || ids[i] >= n) found.values[i] = fuzz::kWrong;
  return found;
}

Outputs expert_product(Random& random) {
  const int64_t n = random.between(1, 60), k = random.between(1, 150), rows = random.between(1, 30);
  const int64_t num_experts = random.between(1, 8), top_k = random.between(1, std::min<int64_t>(num_experts, 4));
  const PanelFormat format = random.one_of({PanelFormat::kInt4, PanelFormat::kInt8});
  std::vector<std::unique_ptr<qserve::Weight>> weights;
  qserve::ExpertGroup group;
  for (int64_t e = 0; e < num_experts; ++e) group.add(*weights.emplace_back(make_panels(random, format, n, k)));
  const bool shared = random.chance(50);
  const int64_t out_stride = n + random.between(0, 3);
  const Array<float> x = numbers(random, rows * (shared ? 1 : top_k) * k), out(rows_size(rows * top_k, n, out_stride));
  const Array<int32_t> ids(rows * top_k, [&](int64_t) { return int32_t(random.between(0, num_experts - 1)); });
  group.multiply({.x = x.get(),
                  .shared_row = shared,
                  .ids = ids.get(),
                  .rows = rows,
                  .top_k = top_k,
                  .out = out.get(),
                  .out_stride = out_stride,
                  .activations = Activations(random.between(0, 2))});
  Outputs found;
  found.add_rows(out, rows * top_k, n, out_stride);
  return found;
}

}  // namespace

int main(int argc, char** argv) {
  return fuzz::run_all({panel_op("int2_matmul", PanelFormat::kInt2),
                        panel_op("int3_matmul", PanelFormat::kInt3),
                        panel_op("int4_matmul", PanelFormat::kInt4),
                        panel_op("int8_matmul", PanelFormat::kInt8),
                        panel_op("int8_matmul, zero points", PanelFormat::kInt8Zeros),
                        panel_op("codebook_matmul", PanelFormat::kCodebook),
                        panel_op("float8_matmul", PanelFormat::kFloat8),
                        {"dense_matmul", dense_product},
                        {"output_head", output_head},
                        {"expert_matmul", expert_product}},
                       argc, argv);
}
