// Compiled once for each instruction set, into a namespace of its own (see CMakeLists.txt).
#include "attention_kernels.h"
#include "attention_tasks.h"
#include "rope_store.h"

namespace qserve::QSERVE_NAMESPACE {

const AttentionKernels kAttentionKernels = {
    .rope_and_store = rope_and_store,
    .attend_split = attend_split,
    .merge_splits = merge_splits,
    .attend_chunk = attend_chunk,
};

}  // namespace qserve::QSERVE_NAMESPACE
