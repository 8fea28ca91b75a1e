#include "output_head.h"

#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "pool.h"
#include "scratch.h"

namespace qserve {
namespace {

// Rows that pass the weight together: bounds the memory for candidates.
constexpr int64_t kRowsTogether = 128;
// Slots for each thread: what evens out threads that run at different speeds.
constexpr int64_t kSlotsPerThread = 16;

struct Candidate {
  float value;
  int32_t id;
};

// Whether an output comes before another whose id is lower.
bool exceeds(float value, float other) { return value > other || (std::isnan(value) && !std::isnan(other)); }

// Up to `capacity` candidates, best first. They come in the order of their ids, so an equal goes behind those that are there.
struct Ranking {
  Candidate* candidates;
  int32_t* count;
  int64_t capacity;

  bool would_take(float value) const { return *count < capacity || exceeds(value, candidates[capacity - 1].value); }

  void add(Candidate candidate) {
    if (!would_take(candidate.value)) return;
    int64_t at = *count < capacity ? (*count)++ : capacity - 1;
    for (; at > 0 && exceeds(candidate.value, candidates[at - 1].value); --at) candidates[at] = candidates[at - 1];
    candidates[at] = candidate;
  }
};

class LargestOutputs final : public OutputSink {
 public:
  LargestOutputs(int64_t num_slots, int64_t rows, int64_t k)
      : OutputSink(num_slots), rows_(rows), k_(k), largest_(kernels().rows.largest) {
    // One list more than there are slots, for the result.
    const size_t lists = (num_slots + 1) * rows;
    Pieces pieces(scratch(ScratchUse::kOp, Pieces::size<Candidate>(lists * k) + Pieces::size<int32_t>(lists)));
    candidates_ = pieces.take<Candidate>(lists * k);
    counts_ = pieces.take<int32_t>(lists);
    std::fill_n(counts_, lists, 0);
  }

  Ranking ranking(int64_t slot, int64_t row) const {
    const int64_t list = slot * rows_ + row;
    return {candidates_ + list * k_, counts_ + list, k_};
  }

  // Most pieces have nothing for the list: their largest says so.
  void take(const OutputPiece& piece) override {
    for (int64_t i = 0; i < piece.num_rows; ++i) {
      const float* values = piece.values + i * piece.stride;
      Ranking best = ranking(piece.slot, piece.row + i);
      const float top = largest_(values, piece.num_columns);
      if (!best.would_take(top)) continue;
      if (k_ == 1) {  // the first of the largest, then nothing
        int64_t c = 0;
        while (exceeds(top, values[c])) ++c;
        best.add({top, int32_t(piece.column + c)});
        continue;
      }
      for (int64_t c = 0; c < piece.num_columns; ++c) best.add({values[c], int32_t(piece.column + c)});
    }
  }

  // Slots in the order of their columns, so that of equals the first is kept.
  Ranking merge(int64_t row) const {
    Ranking all = ranking(num_slots(), row);
    for (int64_t slot = 0; slot < num_slots(); ++slot) {
      const Ranking some = ranking(slot, row);
      for (int64_t i = 0; i < *some.count; ++i) all.add(some.candidates[i]);
    }
    return all;
  }

 private:
  int64_t rows_, k_;
  float (*largest_)(const float*, int64_t);
  Candidate* candidates_;
  int32_t* counts_;
};

}  // namespace

void find_largest(const Weight& weight, const Product& product, int64_t k, int64_t* ids, float* values) {
  for (int64_t row = 0; row < product.rows; row += kRowsTogether) {
    Product some = product;
    some.x += row * product.x_stride;
    some.rows = std::min(kRowsTogether, product.rows - row);
    LargestOutputs sink(kSlotsPerThread * num_threads(), some.rows, k);
    some.sink = &sink;
    weight.multiply(some);
    for (int64_t i = 0; i < some.rows; ++i) {
      const Ranking best = sink.merge(i);
      for (int64_t j = 0; j < k; ++j) {
        ids[(row + i) * k + j] = best.candidates[j].id;
        values[(row + i) * k + j] = best.candidates[j].value;
      }
    }
  }
}

}  // namespace qserve
