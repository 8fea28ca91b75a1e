// Compiled once for each instruction set, into a namespace of its own (see CMakeLists.txt).
#include "dense_matmul.h"
#include "exact_matmul.h"
#include "matmul_kernels.h"
#include "quantize_rows.h"
#include "quantized_matmul.h"

namespace qserve::QSERVE_NAMESPACE {

const MatmulKernels kMatmulKernels = {
    .quantize_rows = quantize_rows,
    .int4_quantized = int4_quantized,
    .int4_exact = int4_exact,
    .int8_quantized = int8_quantized,
    .int8_exact = int8_exact,
    .dense = dense,
};

}  // namespace qserve::QSERVE_NAMESPACE
