// Memory that a thread keeps for intermediate results.
#pragma once

#include <cstddef>

namespace qserve {

// Purposes that may be alive at the same time in one thread: what an op of several products keeps around them, what a call
// shares with all its tasks, and what a task needs.
enum class ScratchUse : int { kOp, kCall, kTask };

// At least `bytes` of memory on a 64-byte boundary, valid until the same thread asks for the same use again. It grows and is
// kept: a step asks for the same amounts as the step before. Throws std::bad_alloc.
std::byte* scratch(ScratchUse use, size_t bytes);

// Hands out consecutive pieces of one block, each on a 64-byte boundary.
class Pieces {
 public:
  explicit Pieces(std::byte* memory) : next_(memory) {}

  template <typename T>
  T* take(size_t count) {
    std::byte* piece = next_;
    next_ += size<T>(count);
    return reinterpret_cast<T*>(piece);
  }

  template <typename T>
  static size_t size(size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }

 private:
  std::byte* next_;
};

}  // namespace qserve
