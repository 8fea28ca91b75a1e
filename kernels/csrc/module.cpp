// The Python face of the native CPU kernels: plain numbers and addresses in, no knowledge of torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;
using qserve::Program;

namespace {

// Raised when a signature changes, which is all that Python knows; qserve.kernels.native has it too.
constexpr int kAbiVersion = 5;

void bind_program(nb::module_& m) {
  nb::class_<Program>(m, "Program")
      .def(nb::init<>())
      .def("begin", &Program::begin)
      .def("end", &Program::end)
      .def("run", &Program::run, nb::call_guard<nb::gil_scoped_release>())
      .def("__len__", &Program::size);
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("abi_version", [] { return kAbiVersion; });
  m.def("isa", [] { return std::string(qserve::kernels().name); });
  m.def("supported_isas", &qserve::supported_isas);
  m.def("select_isa", &qserve::select_isa);
  m.def("num_threads", &qserve::num_threads);
  m.def("set_num_threads", &qserve::set_num_threads, qserve::Released());
  bind_program(m);
  qserve::bind_weights(m);
  qserve::bind_rows(m);
  qserve::bind_attention(m);
  qserve::bind_machine(m);
  qserve::bind_experts(m);
  qserve::bind_sampling(m);
}
