// What the bounds of a machine are measured with: loops that do nothing but read, or nothing but multiply.
//
// This header is included by objects that are compiled for different instruction sets, so it holds plain data only: an
// inline function here could be emitted with AVX-512 and then be called on a machine without it.
#pragma once

#include "layout.h"

namespace qserve {

constexpr int64_t kProbeBytes = 8192;  // operands of the loops that multiply: they stay in the first-level cache

struct ProbeKernels {
  // Reads memory once, a multiple of 512 bytes; returns something that depends on all of it.
  int32_t (*read)(const uint8_t* memory, int64_t bytes);
  // `steps` rounds (a multiple of 4) of the fastest multiplication of bytes that the instruction set has, operands
  // [kProbeBytes]; returns the number of multiplications and additions.
  int64_t (*multiply_bytes)(const uint8_t* operands, int64_t steps);
  // The same in float32.
  int64_t (*multiply_floats)(const uint8_t* operands, int64_t steps);
};

namespace portable {
extern const ProbeKernels kProbeKernels;
}
namespace avx2 {
extern const ProbeKernels kProbeKernels;
}
namespace avx512 {
extern const ProbeKernels kProbeKernels;
}

}  // namespace qserve
