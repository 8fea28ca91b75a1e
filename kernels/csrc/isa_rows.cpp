// Compiled once for each instruction set, into a namespace of its own (see CMakeLists.txt).
#include "elementwise.h"
#include "row_kernels.h"

namespace qserve::QSERVE_NAMESPACE {

const RowKernels kRowKernels = {
    .rms_norm = rms_norm,
    .gated_activation = gated_activation,
};

}  // namespace qserve::QSERVE_NAMESPACE
