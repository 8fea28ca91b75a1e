// Compiled once for each instruction set, into a namespace of its own (see CMakeLists.txt).
#include "elementwise.h"
#include "norms.h"
#include "reductions.h"
#include "row_kernels.h"

namespace qserve::QSERVE_NAMESPACE {

const RowKernels kRowKernels = {
    .rms_norm = rms_norm,
    .rms_norm_int8 = rms_norm_int8,
    .layer_norm = layer_norm,
    .gated_activation = gated_activation,
    .soft_cap = soft_cap,
    .weighted_sum = weighted_sum,
    .largest = largest,
    .summarize = summarize,
};

}  // namespace qserve::QSERVE_NAMESPACE
