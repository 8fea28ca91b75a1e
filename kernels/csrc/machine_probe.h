// What this machine can do at best, with all threads: the bounds that the other kernels are judged by.
#pragma once

#include <cstdint>
#include <memory>

namespace qserve {

class MachineProbe {
 public:
  // Takes `bytes` of memory, rounded up; it has to be more than every cache holds. Throws std::bad_alloc.
  explicit MachineProbe(int64_t bytes);

  // Reads all of it once and returns the number of bytes.
  int64_t read() const;

  // Tasks of `steps` rounds of products each, a multiple of 4; these return the number of multiply-adds of all of them.
  int64_t multiply_bytes(int64_t steps) const;
  int64_t multiply_floats(int64_t steps) const;

 private:
  int64_t bytes_;
  std::shared_ptr<uint8_t[]> memory_;
};

}  // namespace qserve
