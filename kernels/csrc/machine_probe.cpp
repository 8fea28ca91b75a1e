#include "machine_probe.h"

#include <atomic>
#include <cstring>

#include "dispatch.h"
#include "pool.h"
#include "weight_memory.h"

namespace qserve {
namespace {

constexpr int64_t kTaskBytes = int64_t{1} << 20;

// So that a thread that begins late does not end late.
constexpr int64_t kTasksPerThread = 4;

int64_t multiply_everywhere(int64_t (*kernel)(const uint8_t*, int64_t), int64_t steps) {
  alignas(64) uint8_t operands[kProbeBytes] = {};  // zeros: no sum overflows, and no instruction is faster for it
  std::atomic<int64_t> done{0};
  run_tasks(kTasksPerThread * num_threads(), [&](int64_t) { done += kernel(operands, steps); });
  return done;
}

}  // namespace

MachineProbe::MachineProbe(int64_t bytes)
    : bytes_((bytes + kTaskBytes - 1) / kTaskBytes * kTaskBytes), memory_(allocate_weight(bytes_)) {
  // Pages that were never written are one page of zeros, which lies in the cache.
  run_tasks(bytes_ / kTaskBytes, [&](int64_t task) { std::memset(memory_.get() + task * kTaskBytes, 1, kTaskBytes); });
}

int64_t MachineProbe::read() const {
  std::atomic<int32_t> largest{0};
  run_tasks(bytes_ / kTaskBytes,
            [&](int64_t task) { largest = kernels().probe.read(memory_.get() + task * kTaskBytes, kTaskBytes); });
  return bytes_;
}

int64_t MachineProbe::multiply_bytes(int64_t steps) const {
  return multiply_everywhere(kernels().probe.multiply_bytes, steps);
}

int64_t MachineProbe::multiply_floats(int64_t steps) const {
  return multiply_everywhere(kernels().probe.multiply_floats, steps);
}

}  // namespace qserve
