// The sizes that every layout shares, and the types of floats in memory.
//
// This header is included by objects that are compiled for different instruction sets, so it holds plain data only: an
// inline function here could be emitted with AVX-512 and then be called on a machine without it.
#pragma once

#include <cstdint>

namespace qserve {

constexpr int64_t kPanel = 16;            // outputs of a panel
constexpr int64_t kActivationGroup = 32;  // inputs that share an int8 scale
constexpr int64_t kRowBlock = 8;          // rows that are multiplied with a weight once it is unpacked

// How a product with codes takes its activations: qserve.kernels.activations has the same in the same order.
enum class Activations : int { kInt8, kFloat32, kInt8Token, kFloat8Token };

enum class FloatType : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

}  // namespace qserve
