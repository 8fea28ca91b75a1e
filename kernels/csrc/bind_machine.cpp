#include "bind.h"
#include "machine_probe.h"

namespace nb = nanobind;

namespace qserve {

void bind_machine(nb::module_& m) {
  nb::class_<MachineProbe>(m, "MachineProbe")
      .def(nb::init<int64_t>(), Released())
      .def("read", &MachineProbe::read, Released())
      .def("multiply_bytes", &MachineProbe::multiply_bytes, Released())
      .def("multiply_floats", &MachineProbe::multiply_floats, Released());
}

}  // namespace qserve
