// Weights in panels, and products with them.
#pragma once

#include "matmul_kernels.h"
#include "product.h"

namespace qserve {

// A 4-bit or 8-bit weight.
class PanelWeight : public Weight {
 public:
  // Throws std::invalid_argument for sizes that do not fit the layout.
  PanelWeight(int bits, int64_t out_features, int64_t in_features, int64_t group_size, bool wide);

  // Makes the panels. codes [N][K], one a byte (int8 codes as they are), scales [N][groups]; zero_points [N][groups] for 4 bits,
  // else null. Throws std::bad_alloc.
  void pack(const uint8_t* codes, const float* scales, const uint8_t* zero_points);

  int64_t out_features() const override { return job_.out_features; }
  int64_t in_features() const override { return job_.k; }
  void multiply(const Product& product) const override;

 private:
  void pack_panel(uint8_t* panel, int64_t index, const uint8_t* codes, const float* scales, const uint8_t* zero_points) const;
  void multiply_some(const Product& product) const;

  int bits_;
  int64_t num_panels_, padded_k_;
  PanelJob job_{};
};

// A float weight.
class DenseWeight : public Weight {
 public:
  DenseWeight(int64_t out_features, int64_t in_features, FloatType type);

  // Makes the panels. weight [N][K]. Throws std::bad_alloc.
  void pack(const void* weight);

  int64_t out_features() const override { return job_.out_features; }
  int64_t in_features() const override { return job_.k; }
  void multiply(const Product& product) const override;

 private:
  int64_t num_panels_;
  DenseJob job_{};
};

}  // namespace qserve
