#include "scratch.h"

#include <algorithm>
#include <memory>
#include <new>

#include "exact_memory.h"

namespace qserve {
namespace {

struct Free {
  void operator()(std::byte* memory) const { operator delete[](memory, std::align_val_t{64}); }
};

struct Block {
  std::unique_ptr<std::byte[], Free> memory;
  size_t size = 0;
};

}  // namespace

std::byte* scratch(ScratchUse use, size_t bytes) {
  thread_local Block blocks[3];
  Block& block = blocks[int(use)];
  if (block.size < bytes || block.memory == nullptr || kExactMemory) {
    const size_t size = kExactMemory ? bytes : std::max(bytes, block.size * 3 / 2 + 4096);
    block.memory.reset();
    block.size = 0;
    block.memory.reset(new (std::align_val_t{64}) std::byte[size]);
    block.size = size;
  }
  return block.memory.get();
}

}  // namespace qserve
