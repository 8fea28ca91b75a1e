// The end of every product: the bias, and outputs that may not fill a vector.
#pragma once

#include "matmul_kernels.h"
#include "simd.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

template <typename Job>
QSERVE_INLINE void store_outputs(const Job& job, int64_t row, int64_t column, F value) {
  const int64_t left = job.out_features - column;
  float* out = job.out + row * job.out_stride + column;
  if (job.bias != nullptr) value = add(value, load(job.bias + column));
  if (left >= W) {
    store(out, value);
  } else if (left > 0) {
    store_part(out, value, int(left));
  }
}

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
