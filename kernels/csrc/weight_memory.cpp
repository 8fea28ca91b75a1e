#include "weight_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "exact_memory.h"
#include "pool.h"

namespace qserve {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kRegion = size_t{64} << 20;  // address space; memory is taken when it is written

constexpr size_t kChecksumPiece = size_t{256} << 10;  // bytes that a task sums up
constexpr uint64_t kOddFactor = 0x9E3779B97F4A7C15;    // 2^64 divided by the golden ratio: bits well spread

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

// Each step is a bijection of the sum for a given word and of the word for a given sum, so one changed word is never lost.
uint64_t mix(uint64_t sum, uint64_t word) { return std::rotl((sum ^ word) * kOddFactor, 29); }

uint64_t checksum_piece(const uint8_t* data, size_t bytes) {
  constexpr size_t kLanes = 8;  // independent chains: a multiplication takes several cycles
  uint64_t sums[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8}, words[kLanes];
  for (size_t i = 0; i < bytes; i += sizeof words) {
    if (i + sizeof words > bytes) std::memset(words, 0, sizeof words);
    std::memcpy(words, data + i, std::min(sizeof words, bytes - i));
    for (size_t lane = 0; lane < kLanes; ++lane) sums[lane] = mix(sums[lane], words[lane]);
  }
  uint64_t sum = bytes;
  for (const uint64_t lane : sums) sum = mix(sum, lane);
  return sum;
}

}  // namespace

uint64_t checksum(const uint8_t* data, size_t bytes) {
  std::vector<uint64_t> sums((bytes + kChecksumPiece - 1) / kChecksumPiece);
  run_tasks(sums.size(), [&](int64_t i) {
    const size_t begin = i * kChecksumPiece;
    sums[i] = checksum_piece(data + begin, std::min(kChecksumPiece, bytes - begin));
  });
  uint64_t sum = bytes;
  for (const uint64_t piece : sums) sum = mix(sum, piece);
  return sum;
}

std::shared_ptr<uint8_t[]> allocate_weight(size_t bytes) {
  if (kExactMemory) {
    constexpr std::align_val_t kLine{64};
    return {new (kLine) uint8_t[bytes], [](uint8_t* memory) { operator delete[](memory, kLine); }};
  }
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
