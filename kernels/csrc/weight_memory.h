// Where packed weights live.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace qserve {

// Memory for a packed weight on a 64-byte boundary, freed with the last owner.
//
// Weights of a model lie one after the other in large regions for which the system is asked for huge pages: every token reads
// them all, and prefetching stops at the end of a page. Throws std::bad_alloc.
std::shared_ptr<uint8_t[]> allocate_weight(size_t bytes);

}  // namespace qserve
