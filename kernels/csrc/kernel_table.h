// All kernels of one instruction set.
#pragma once

#include "attention_kernels.h"
#include "matmul_kernels.h"
#include "probe_kernels.h"
#include "row_kernels.h"

namespace qserve {

struct KernelTable {
  const char* name;
  const MatmulKernels& matmul;
  const AttentionKernels& attention;
  const RowKernels& rows;
  const ProbeKernels& probe;
};

}  // namespace qserve
