// The ops on each row of a batch: norm, activation.
#pragma once

#include "row_kernels.h"

namespace qserve {

void rms_norm(const NormJob& job, int64_t rows);
void gated_activation(const GateJob& job, int64_t rows);

}  // namespace qserve
