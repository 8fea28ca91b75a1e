// The parts of the Python module, one for each family of ops: plain numbers and addresses in, no knowledge of torch.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "program.h"

namespace qserve {

using Released = nanobind::call_guard<nanobind::gil_scoped_release>;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_weights(nanobind::module_& m);
void bind_rows(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_machine(nanobind::module_& m);
void bind_experts(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);

}  // namespace qserve
