// Norms, gated activations, sampling, and the parts of a mixture of experts that work on rows.
#include "experts.h"
#include "fuzz.h"
#include "rows.h"
#include "sampling.h"

namespace {

using fuzz::Array;
using fuzz::numbers;
using fuzz::Outputs;
using fuzz::Random;
using fuzz::rows_size;

// The operands of a norm, in arrays that live as long as this.
struct NormOperands {
  explicit NormOperands(Random& random)
      : rows(random.between(1, 20)), width(random.between(1, 300)), x_stride(width + random.between(0, 5)),
        residual_stride(width + random.between(0, 5)), out_stride(width + random.between(0, 5)),
        x(numbers(random, rows_size(rows, width, x_stride))),
        residual(numbers(random, rows_size(rows, width, residual_stride))), weight(numbers(random, width)),
        bias(numbers(random, width)), out(rows_size(rows, width, out_stride)), adds(random.chance(50)) {
    job = {.x = x.get(),
           .x_stride = x_stride,
           .residual = adds ? residual.get() : nullptr,
           .residual_stride = residual_stride,
           .weight = weight.get(),
           .weight_offset = random.chance(30) ? 1.0f : 0.0f,
           .eps = 1e-5f,
           .out = out.get(),
           .out_stride = out_stride,
           .width = width};
  }

  Outputs outputs() const {
    Outputs found;
    found.add_rows(out, rows, width, out_stride);
    return found;
  }

  int64_t rows, width, x_stride, residual_stride, out_stride;
  Array<float> x, residual, weight, bias, out;
  bool adds;
  qserve::NormJob job;
};

Outputs rms_norm(Random& random) {
  NormOperands operands(random);
  qserve::rms_norm(operands.job, operands.rows);
  return operands.outputs();
}

Outputs rms_norm_int8(Random& random) {
  NormOperands operands(random);
  Array<int8_t> codes(operands.rows * operands.width);
  Array<float> scales(operands.rows);
  qserve::rms_norm_int8({.norm = operands.job, .codes = codes.get(), .scales = scales.get()}, operands.rows);
  Outputs found{.values = {}, .tolerance = 0.01f};  // a code may be one off where two sums differ in their last bit
  for (int64_t i = 0; i < codes.count(); ++i) found.values.push_back(float(codes[i]) * scales[i / operands.width]);
  return found;
}

Outputs layer_norm(Random& random) {
  NormOperands operands(random);
  if (operands.width == 1) return {};  // nothing is left of one number but the rounding of its mean
  qserve::layer_norm({.norm = operands.job, .bias = random.chance(50) ? operands.bias.get() : nullptr}, operands.rows);
  Outputs found = operands.outputs();
  found.tolerance = 1e-2f;  // of two numbers that are nearly equal, the distance is mostly rounding
  return found;
}

Outputs head_norm(Random& random) {
  const int64_t rows = random.between(1, 20), heads = random.between(1, 6), width = random.between(1, 140);
  const int64_t stride = heads * width + random.between(0, 5);
  const Array<float> x = numbers(random, rows_size(rows, heads * width, stride)), weight = numbers(random, width);
  qserve::head_norm({.x = x.get(),
                     .x_stride = stride,
                     .residual = nullptr,
                     .residual_stride = 0,
                     .weight = weight.get(),
                     .weight_offset = random.chance(30) ? 1.0f : 0.0f,
                     .eps = 1e-5f,
                     .out = x.get(),
                     .out_stride = stride,
                     .width = width},
                    rows, heads);
  Outputs found;
  found.add_rows(x, rows, heads * width, stride);
  return found;
}

Outputs soft_cap(Random& random) {
  const int64_t rows = random.between(1, 20), width = random.between(1, 300);
  const int64_t x_stride = width + random.between(0, 5), out_stride = width + random.between(0, 5);
  const Array<float> x = numbers(random, rows_size(rows, width, x_stride)), out(rows_size(rows, width, out_stride));
  qserve::soft_cap(
      {.x = x.get(), .x_stride = x_stride, .out = out.get(), .out_stride = out_stride, .width = width, .cap = 30.0f}, rows);
  Outputs found;
  found.add_rows(out, rows, width, out_stride);
  return found;
}

Outputs gated_activation(Random& random) {
  const int64_t rows = random.between(1, 20), width = random.between(1, 300);
  const int64_t x_stride = 2 * width + random.between(0, 5), out_stride = width + random.between(0, 5);
  const Array<float> x = numbers(random, rows_size(rows, 2 * width, x_stride));
  const Array<float> out(rows_size(rows, width, out_stride));
  qserve::gated_activation({.gate_up = x.get(),
                            .x_stride = x_stride,
                            .out = out.get(),
                            .out_stride = out_stride,
                            .width = width,
                            .gate = random.one_of({qserve::Gate::kSilu, qserve::Gate::kGelu, qserve::Gate::kGeluTanh})},
                           rows);
  Outputs found;
  found.add_rows(out, rows, width, out_stride);
  return found;
}

Outputs sample(Random& random) {
  const int64_t rows = random.between(1, 6), vocabulary = random.between(1, 2000), stride = vocabulary + random.between(0, 3);
  const Array<float> logits = numbers(random, rows_size(rows, vocabulary, stride));
  const auto vector = [&](const auto& make) { return Array<float>(rows, [&](int64_t) { return float(make()); }); };
  const Array<float> temperature = vector([&] { return random.one_of({0.0, 0.7, 1.0, 1.5}); });
  const Array<float> top_p = vector([&] { return random.one_of({0.0, 0.5, 0.95, 1.0}); });
  const Array<float> min_p = vector([&] { return random.one_of({0.0, 0.05, 1.0}); });
  const Array<float> repetition = vector([&] { return random.one_of({1.0, 1.3}); });
  const Array<float> frequency = vector([&] { return random.one_of({0.0, 0.5}); });
  const Array<float> presence = vector([&] { return random.one_of({0.0, -0.5}); });
  const Array<int32_t> top_k(rows, [&](int64_t) { return int32_t(random.one_of({0, 1, 5, 50, 5000})); });
  const Array<double> uniforms(rows, [&](int64_t) { return random.uniform(); });
  const int64_t each = random.between(0, std::min<int64_t>(vocabulary, 9));  // adjusted tokens of a row
  const Array<int32_t> starts(rows + 1, [&](int64_t r) { return int32_t(r * each); });
  const Array<int32_t> ids(rows * each, [&](int64_t i) { return int32_t(i % each * (vocabulary / each)); });
  const Array<float> biases = numbers(random, rows * each);
  const Array<int32_t> counts(rows * each, [&](int64_t) { return int32_t(random.between(-1, 3)); });
  const Array<int64_t> tokens(rows);
  qserve::sample_tokens({.logits = logits.get(),
                         .stride = stride,
                         .rows = rows,
                         .vocabulary = vocabulary,
                         .temperature = temperature.get(),
                         .top_k = top_k.get(),
                         .top_p = top_p.get(),
                         .min_p = min_p.get(),
                         .repetition_penalty = repetition.get(),
                         .frequency_penalty = frequency.get(),
                         .presence_penalty = presence.get(),
                         .uniforms = uniforms.get(),
                         .starts = random.chance(70) ? starts.get() : nullptr,
                         .token_ids = ids.get(),
                         .biases = biases.get(),
                         .counts = counts.get(),
                         .num_adjustments = rows * each,
                         .tokens = tokens.get()});
  Outputs found;  // that each is a token: instruction sets may draw different ones where a sum decides by its last bit
  for (int64_t r = 0; r < rows; ++r)
    found.values.push_back(tokens[r] < 0 || tokens[r] >= vocabulary ? fuzz::kWrong : float(vocabulary));
  return found;
}

Outputs route_tokens(Random& random) {
  const int64_t rows = random.between(1, 20), experts = random.between(1, 70);
  const int64_t top_k = random.between(1, std::min<int64_t>(experts, 8));
  const int64_t stride = experts + random.between(0, 3);
  const Array<float> logits = numbers(random, rows_size(rows, experts, stride));
  const Array<int32_t> ids(rows * top_k);
  const Array<float> weights(rows * top_k);
  qserve::route_tokens({.logits = logits.get(),
                        .stride = stride,
                        .rows = rows,
                        .num_experts = experts,
                        .top_k = top_k,
                        .renormalize = random.chance(50),
                        .ids = ids.get(),
                        .weights = weights.get()});
  Outputs found;
  found.add_rows(weights, rows, top_k, top_k);
  return found;
}

Outputs combine_experts(Random& random) {
  const int64_t rows = random.between(1, 20), top_k = random.between(1, 8), width = random.between(1, 300);
  const int64_t out_stride = width + random.between(0, 5);
  const Array<float> x = numbers(random, rows * top_k * width), weights = numbers(random, rows * top_k);
  const Array<float> out(rows_size(rows, width, out_stride));
  qserve::combine_experts({.x = x.get(),
                           .weights = weights.get(),
                           .out = out.get(),
                           .out_stride = out_stride,
                           .count = top_k,
                           .width = width},
                          rows);
  Outputs found;
  found.add_rows(out, rows, width, out_stride);
  return found;
}

}  // namespace

int main(int argc, char** argv) {
  return fuzz::run_all({{"rms_norm", rms_norm},
                        {"rms_norm_int8", rms_norm_int8},
                        {"layer_norm", layer_norm},
                        {"head_norm", head_norm},
                        {"soft_cap", soft_cap},
                        {"gated_activation", gated_activation},
                        {"sample", sample},
                        {"route_tokens", route_tokens},
                        {"combine_experts", combine_experts}},
                       argc, argv);
}
