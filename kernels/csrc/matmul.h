// Weights in panels, and products with them.
#pragma once

#include "matmul_kernels.h"
#include "product.h"

namespace qserve {

// What a layout of codes holds. bias: a number for each output. ordered: inputs are taken in another order.
struct PanelSizes {
  int64_t out_features, in_features;
  PanelFormat format;
  int64_t group_size;
  bool wide, bias, ordered;
};

// Arrays that a weight is made of. codes [N][K] bytes, scales [N][groups], zero_points [N][groups], bias [N], input_order [K],
// codebook [16] in units of its rounding to int8; those that the sizes do not ask for may be null.
struct PanelSource {
  const uint8_t* codes;
  const float* scales;
  const uint8_t* zero_points;
  const float* bias;
  const int64_t* input_order;
  const float* codebook;
};

// A weight of integer codes, places in a codebook, or 8-bit floats.
class PanelWeight : public Weight {
 public:
  // Throws std::invalid_argument for sizes that do not fit the layout.
  explicit PanelWeight(const PanelSizes& sizes);

  // Makes the layout: bias, input order, codebook, panels. Throws std::bad_alloc.
  void pack(const PanelSource& source);

  int64_t out_features() const override { return sizes_.out_features; }
  int64_t in_features() const override { return sizes_.in_features; }
  void multiply(const Product& product) const override;

 private:
  void pack_panel(uint8_t* panel, int64_t index, const PanelSource& source) const;
  void multiply_some(const Product& product) const;
  void round_some(const RoundJob& job, void (*round)(const RoundJob&, int64_t, int64_t)) const;

  PanelSizes sizes_;
  int64_t num_panels_, order_offset_, codebook_offset_, panels_offset_;  // the bias is first
  PanelJob job_{};
};

// A float weight.
class DenseWeight : public Weight {
 public:
  DenseWeight(int64_t out_features, int64_t in_features, FloatType type, bool bias);

  // Makes the panels, and the bias after them. weight [N][K], bias [N] or null. Throws std::bad_alloc.
  void pack(const void* weight, const float* bias);

  int64_t out_features() const override { return job_.out_features; }
  int64_t in_features() const override { return job_.k; }
  void multiply(const Product& product) const override;

 private:
  int64_t num_panels_, bias_offset_;
  bool bias_;
  DenseJob job_{};
};

}  // namespace qserve
