// Random shapes and values for the native ops, with every array on a heap block of exactly its size, so that AddressSanitizer
// sees the first byte that is read or written past an end.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "dispatch.h"
#include "pool.h"

namespace fuzz {

// SplitMix64 (Steele, Lea and Flood 2014): the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }

  // From first to last, both included.
  int64_t between(int64_t first, int64_t last) { return first + int64_t(bits() % uint64_t(last - first + 1)); }

  bool chance(int percent) { return between(1, 100) <= percent; }

  double uniform() { return double(bits() >> 11) * 0x1p-53; }

  // Mostly of the size of activations, now and then 0, tiny or huge.
  float number() {
    const float x = float(uniform() * 8 - 4);
    const int64_t kind = between(0, 99);
    return kind == 0 ? 0.0f : kind == 1 ? x * 1e-30f : kind == 2 ? x * 1e4f : x;
  }

  template <typename T>
  T one_of(std::initializer_list<T> items) {
    return items.begin()[between(0, int64_t(items.size()) - 1)];
  }

 private:
  uint64_t state_;
};

// An array of exactly `count` elements.
template <typename T>
class Array {
 public:
  explicit Array(int64_t count) : count_(count), memory_(static_cast<T*>(std::malloc(count * sizeof(T))), std::free) {
    std::memset(static_cast<void*>(memory_.get()), 0xFF, count * sizeof(T));  // NaN: what is not written shows
  }

  template <typename Make>
  Array(int64_t count, const Make& make) : Array(count) {
    for (int64_t i = 0; i < count; ++i) memory_.get()[i] = make(i);
  }

  T* get() const { return memory_.get(); }
  int64_t count() const { return count_; }
  T& operator[](int64_t i) const { return memory_.get()[i]; }

 private:
  int64_t count_;
  std::unique_ptr<T, void (*)(void*)> memory_;
};

inline Array<float> numbers(Random& random, int64_t count) {
  return {count, [&](int64_t) { return random.number(); }};
}

// Rows that lie apart: the first element of the last row is at (rows - 1) * stride, and the array ends with that row.
inline int64_t rows_size(int64_t rows, int64_t width, int64_t stride) { return (rows - 1) * stride + width; }

constexpr float kWrong = std::numeric_limits<float>::quiet_NaN();  // as an output: reported

// What an op computed, as far as instruction sets have to agree about it, and to how much of the largest number.
struct Outputs {
  std::vector<float> values;
  float tolerance = 1e-4f;

  void add_rows(const Array<float>& from, int64_t rows, int64_t width, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < width; ++i) values.push_back(from[r * stride + i]);
  }
};

struct Op {
  const char* name;
  std::function<Outputs(Random&)> run;
};

// Empty, or what is wrong with `found`.
inline std::string compare(const Outputs& found, const Outputs& expected) {
  float largest = 0.0f;
  for (float value : expected.values) largest = std::fmax(largest, std::fabs(value));
  if (found.values.size() != expected.values.size()) return "has another number of outputs";
  for (size_t i = 0; i < found.values.size(); ++i) {
    const float a = found.values[i], b = expected.values[i];
    if (!std::isfinite(a)) return "is not finite at output " + std::to_string(i);
    if (std::fabs(a - b) > expected.tolerance * largest)
      return "has " + std::to_string(a) + " at output " + std::to_string(i) + ", expected " + std::to_string(b);
  }
  return "";
}

// Runs every op on `rounds` random inputs, on every instruction set that the machine has: they must agree with the portable one.
inline int run_all(const std::vector<Op>& ops, int argc, char** argv) {
  const int64_t rounds = argc > 1 ? std::atoll(argv[1]) : 1000;
  const std::vector<std::string> isas = qserve::supported_isas();
  qserve::set_num_threads(2);
  for (const Op& op : ops) {
    for (int64_t round = 0; round < rounds; ++round) {
      const uint64_t seed = std::hash<std::string>()(op.name) + uint64_t(round);
      qserve::select_isa("portable");
      Random random(seed);
      const Outputs expected = op.run(random);
      for (const std::string& isa : isas) {
        qserve::select_isa(isa);
        Random again(seed);
        const std::string wrong = compare(op.run(again), expected);
        if (wrong.empty()) continue;
        std::printf("%s, round %lld: %s %s\n", op.name, static_cast<long long>(round), isa.c_str(), wrong.c_str());
        return 1;
      }
    }
    std::printf("%-24s %lld rounds on %zu instruction sets\n", op.name, static_cast<long long>(rounds), isas.size());
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace fuzz
