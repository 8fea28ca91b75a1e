// The ops on each row of a batch: norms, activations.
#pragma once

#include "row_kernels.h"

namespace qserve {

void rms_norm(const NormJob& job, int64_t rows);
// A norm of its own for each of the `heads` of job.width that lie side by side in a row.
void head_norm(const NormJob& job, int64_t rows, int64_t heads);
void rms_norm_int8(const RoundedNormJob& job, int64_t rows);
void layer_norm(const LayerNormJob& job, int64_t rows);
void gated_activation(const GateJob& job, int64_t rows);
void soft_cap(const SoftCapJob& job, int64_t rows);

}  // namespace qserve
