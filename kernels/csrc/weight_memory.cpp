#include "weight_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>

namespace qserve {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kRegion = size_t{64} << 20;  // address space; memory is taken when it is written

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

std::shared_ptr<uint8_t[]> map_region(size_t bytes) {
  const size_t mapped = bytes + kHugePage;  // room to begin on the boundary of a huge page
  void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  auto* first = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(start), kHugePage));
#if defined(MADV_HUGEPAGE)
  madvise(first, bytes, MADV_HUGEPAGE);  // a wish: without it the pages are small
#endif
  return {first, [start, mapped](uint8_t*) { munmap(start, mapped); }};
}

}  // namespace

std::shared_ptr<uint8_t[]> allocate_weight(size_t bytes) {
  static std::mutex mutex;
  static std::shared_ptr<uint8_t[]> region;
  static size_t used = 0;
  const size_t size = round_up(bytes, 64);
  if (size > kRegion / 4) return map_region(round_up(size, kHugePage));
  std::lock_guard lock(mutex);
  if (region == nullptr || used + size > kRegion) {
    region = map_region(kRegion);
    used = 0;
  }
  used += size;
  return {region, region.get() + used - size};
}

}  // namespace qserve
