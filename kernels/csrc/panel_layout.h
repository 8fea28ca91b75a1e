// Where the parts of a panel lie.
//
// A panel is read from front to back, so that memory sees one stream: a jump over all scales of a long row puts what the machine
// fetches ahead out of step, and halves the rate. So groups come in runs. A run is the scales of its groups [groups][16]
// (float16, or float32 when wide), their zero points [groups][16] bytes if the format has them, padding to 64 bytes, their codes.
#pragma once

#include "matmul_kernels.h"

namespace qserve {

constexpr int64_t kRun = 4;  // groups; of so many, scales and zero points always fill whole lines
constexpr int64_t kLine = 64;

// Offsets in a panel of what belongs to a group.
struct GroupPlace {
  int64_t scales, zero_points, codes;
};

// static: a copy for each object, and so for each instruction set.
[[gnu::always_inline]] static inline GroupPlace place_of_group(const PanelJob& job, int64_t group) {
  const int64_t in_run = group % kRun, first = group - in_run, left = job.num_groups - first;
  const int64_t groups = left < kRun ? left : kRun, scale_bytes = kPanel * (job.wide ? 4 : 2);
  const int64_t run = first * (job.number_bytes + job.code_bytes);
  const int64_t codes = run + (groups * job.number_bytes + kLine - 1) / kLine * kLine;
  return {run + in_run * scale_bytes, run + groups * scale_bytes + in_run * kPanel, codes + in_run * job.code_bytes};
}

}  // namespace qserve
