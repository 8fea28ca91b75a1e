// The Python face of the native CPU kernels.
#include <nanobind/nanobind.h>

NB_MODULE(_cpu, m) { m.def("abi_version", [] { return 1; }); }
