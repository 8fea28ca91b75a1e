#include "rows.h"

#include "dispatch.h"
#include "row_tasks.h"

namespace qserve {

void rms_norm(const NormJob& job, int64_t rows) { run_rows(job, rows, job.width, kernels().rows.rms_norm); }

void rms_norm_int8(const RoundedNormJob& job, int64_t rows) {
  run_rows(job, rows, job.norm.width, kernels().rows.rms_norm_int8);
}

void layer_norm(const LayerNormJob& job, int64_t rows) { run_rows(job, rows, job.norm.width, kernels().rows.layer_norm); }

void gated_activation(const GateJob& job, int64_t rows) {
  run_rows(job, rows, 2 * job.width, kernels().rows.gated_activation);
}

}  // namespace qserve
