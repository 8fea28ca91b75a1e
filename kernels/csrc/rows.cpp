#include "rows.h"

#include "dispatch.h"
#include "row_tasks.h"

namespace qserve {
namespace {

struct HeadNormJob {
  NormJob norm;
  int64_t heads;
};

void norm_heads(const HeadNormJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    NormJob heads = job.norm;  // the heads are its rows
    heads.x += row * job.norm.x_stride;
    heads.out += row * job.norm.out_stride;
    heads.x_stride = heads.out_stride = job.norm.width;
    kernels().rows.rms_norm(heads, 0, job.heads);
  }
}

}  // namespace

void rms_norm(const NormJob& job, int64_t rows) { run_rows(job, rows, job.width, kernels().rows.rms_norm); }

void head_norm(const NormJob& job, int64_t rows, int64_t heads) {
  run_rows(HeadNormJob{job, heads}, rows, heads * job.width, norm_heads);
}

void rms_norm_int8(const RoundedNormJob& job, int64_t rows) {
  run_rows(job, rows, job.norm.width, kernels().rows.rms_norm_int8);
}

void layer_norm(const LayerNormJob& job, int64_t rows) { run_rows(job, rows, job.norm.width, kernels().rows.layer_norm); }

void gated_activation(const GateJob& job, int64_t rows) {
  run_rows(job, rows, 2 * job.width, kernels().rows.gated_activation);
}

void soft_cap(const SoftCapJob& job, int64_t rows) { run_rows(job, rows, job.width, kernels().rows.soft_cap); }

}  // namespace qserve
