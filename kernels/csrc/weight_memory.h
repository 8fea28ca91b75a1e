// Where packed weights live.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace qserve {

// Memory for a packed weight on a 64-byte boundary, freed with the last owner.
//
// Weights of a model lie one after the other in large regions for which the system is asked for huge pages: every token reads
// them all, and prefetching stops at the end of a page. Throws std::bad_alloc.
std::shared_ptr<uint8_t[]> allocate_weight(size_t bytes);

// A 64-bit checksum for what lies at data: any one damaged word is found, more of them with all but certainty. It is no defence
// against somebody who forges it. As fast as memory is read, on all threads; the same whatever their number.
uint64_t checksum(const uint8_t* data, size_t bytes);

// A weight in the layout of its kernels, all of it in one run of memory: what the constructor was told and these bytes make the
// same weight again, in another process and on any instruction set. So a layout holds no address, and nothing of a weight (bias,
// order of inputs) lies elsewhere.
class PackedWeight {
 public:
  virtual ~PackedWeight() = default;

  int64_t nbytes() const { return nbytes_; }

  // The layout; null before there is one.
  const uint8_t* data() const { return memory_.get(); }

  // Takes memory of nbytes(), for the layout to be written to. Throws std::bad_alloc.
  uint8_t* allocate() {
    memory_ = allocate_weight(nbytes_);
    return memory_.get();
  }

 protected:
  void set_nbytes(int64_t nbytes) { nbytes_ = nbytes; }  // by the constructor

 private:
  int64_t nbytes_ = 0;
  std::shared_ptr<uint8_t[]> memory_;
};

}  // namespace qserve
