// The choice among the instruction sets that were built.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace qserve {

// The kernels in use: at first the best that this machine has.
const KernelTable& kernels();

// Names of what was built and this machine can run, best first.
std::vector<std::string> supported_isas();

// Throws std::invalid_argument for a name that is not in supported_isas().
void select_isa(const std::string& name);

}  // namespace qserve
