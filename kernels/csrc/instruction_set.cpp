// Compiled once for each instruction set, into a namespace of its own (see CMakeLists.txt).
#include "attention_tasks.h"
#include "dense_matmul.h"
#include "elementwise.h"
#include "exact_matmul.h"
#include "quantize_rows.h"
#include "quantized_matmul.h"

namespace qserve::QSERVE_NAMESPACE {

const KernelTable kTable = {
    .name = kName,
    .quantize_rows = quantize_rows,
    .int4_quantized = int4_quantized,
    .int4_exact = int4_exact,
    .int8_quantized = int8_quantized,
    .int8_exact = int8_exact,
    .dense = dense,
    .rms_norm = rms_norm,
    .silu_mul = silu_mul,
    .rope_and_store = rope_and_store,
    .attend_split = attend_split,
    .merge_splits = merge_splits,
    .attend_chunk = attend_chunk,
};

}  // namespace qserve::QSERVE_NAMESPACE
