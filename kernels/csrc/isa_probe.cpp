// Compiled once for each instruction set, into a namespace of its own (see CMakeLists.txt).
#include "probe_kernels.h"
#include "probe_loops.h"

namespace qserve::QSERVE_NAMESPACE {

const ProbeKernels kProbeKernels = {
    .read = read_memory,
    .multiply_bytes = multiply_bytes,
    .multiply_floats = multiply_floats,
};

}  // namespace qserve::QSERVE_NAMESPACE
