// Rows times a weight of any kind, and what becomes of the outputs.
#pragma once

#include "layout.h"
#include "weight_memory.h"

namespace qserve {

// Outputs of some rows and columns of a product; those of row `row + i` begin at values + i * stride.
struct OutputPiece {
  const float* values;
  int64_t stride;
  int64_t row, num_rows;
  int64_t column, num_columns;
  int64_t slot;
};

// Looks at the outputs of a product while they are in the cache, instead of having them written.
//
// A slot is a range of columns: slot 0 has the first. The pieces of a slot come one after the other, columns ascending;
// different slots, and different rows of one slot, may come at the same time from several threads.
class OutputSink {
 public:
  explicit OutputSink(int64_t num_slots) : num_slots_(num_slots) {}

  // Slots are numbered below this.
  int64_t num_slots() const { return num_slots_; }

  virtual void take(const OutputPiece& piece) = 0;

 protected:
  ~OutputSink() = default;

 private:
  int64_t num_slots_;
};

// out [rows][N] = x [rows][K] * weight^T + bias. With a sink, out is not written.
struct Product {
  const float* x;
  int64_t x_stride;
  int64_t rows;
  float* out;
  int64_t out_stride;
  Activations activations;  // a float weight takes x as it is
  OutputSink* sink = nullptr;
};

// What every weight can do, whatever its format.
class Weight : public PackedWeight {
 public:
  virtual int64_t out_features() const = 0;
  virtual int64_t in_features() const = 0;
  virtual void multiply(const Product& product) const = 0;
};

}  // namespace qserve
