// The formats of panels: how the codes of 32 inputs x W outputs become operands of a product.
//
// A layout takes the codes of 32 inputs apart: quads(codes, use) calls use(q, bytes) for each quad q of 4 inputs, with a vector
// that has the code of input 4 q + j in byte j of each 32-bit lane. A format says what such a byte means:
//   kZeroPoints   whether each group has a zero point for each output
//   kBias         what an integer product takes off each byte
//   Dot<R>        the integer product with R rows
//   operand       the byte that enters it
//   value<J>      the float that byte J stands for, before scales
#pragma once

#include "matmul_kernels.h"
#include "simd.h"

namespace qserve::QSERVE_NAMESPACE {
namespace {

struct TwoBits {
  static constexpr int kLines = 2;  // of 64 bytes, for 32 inputs of a panel

  template <typename Use>
  QSERVE_INLINE void quads(const uint8_t* codes, const Use& use) {
    each<2>([&](auto v) QSERVE_INLINE_LAMBDA {
      const I four = load_lanes(codes + 64 * v);
      each<4>([&](auto i) QSERVE_INLINE_LAMBDA { use(Index<4 * v + i>{}, byte_field<2 * i, 3>(four)); });
    });
  }
};

// Two lines as above, and one with the highest bits of all quads.
struct ThreeBits {
  static constexpr int kLines = 3;

  template <typename Use>
  QSERVE_INLINE void quads(const uint8_t* codes, const Use& use) {
    const I high = load_lanes(codes + 128);
    TwoBits::quads(codes, [&](auto q, I low) QSERVE_INLINE_LAMBDA { use(q, bytes_or(low, byte_field<q - 2, 4>(high))); });
  }
};

struct FourBits {
  static constexpr int kLines = 4;

  template <typename Use>
  QSERVE_INLINE void quads(const uint8_t* codes, const Use& use) {
    each<4>([&](auto v) QSERVE_INLINE_LAMBDA {
      const I both = load_lanes(codes + 64 * v);
      each<2>([&](auto i) QSERVE_INLINE_LAMBDA { use(Index<2 * v + i>{}, byte_field<4 * i, 15>(both)); });
    });
  }
};

struct EightBits {
  static constexpr int kLines = 8;

  template <typename Use>
  QSERVE_INLINE void quads(const uint8_t* codes, const Use& use) {
    each<8>([&](auto v) QSERVE_INLINE_LAMBDA { use(v, load_lanes(codes + 64 * v)); });
  }
};

// Integers of up to 4 bits.
template <typename Layout>
struct SmallCodes : Layout {
  static constexpr bool kZeroPoints = true;
  static constexpr int kBias = 0;
  template <int R>
  using Dot = SmallDot<R>;

  explicit SmallCodes(const PanelJob&) {}
  QSERVE_INLINE_METHOD I operand(I bytes) const { return bytes; }
  template <int J>
  QSERVE_INLINE_METHOD F value(I bytes, F zero_points) const {
    return sub(byte_value<J>(bytes), zero_points);
  }
};

// Integers of 8 bits; without zero points, 128 stands for 0.
template <bool ZeroPoints>
struct ByteCodes : EightBits {
  static constexpr bool kZeroPoints = ZeroPoints;
  static constexpr int kBias = 128;
  template <int R>
  using Dot = ByteDot<R>;

  explicit ByteCodes(const PanelJob&) {}
  QSERVE_INLINE_METHOD I operand(I bytes) const { return bytes; }
  template <int J>
  QSERVE_INLINE_METHOD F value(I bytes, F zero_points) const {
    return sub(byte_value<J>(bytes), zero_points);
  }
};

// Places in a table of 16, which is in floats, and for integer products rounded to int8.
struct CodebookCodes : FourBits {
  static constexpr bool kZeroPoints = false;
  static constexpr int kBias = 128;
  template <int R>
  using Dot = ByteDot<R>;

  explicit CodebookCodes(const PanelJob& job) : bytes_(job.byte_codebook), floats_(job.codebook) {}
  QSERVE_INLINE_METHOD I operand(I bytes) const { return bytes_.find(bytes); }
  template <int J>
  QSERVE_INLINE_METHOD F value(I bytes, F) const {
    return floats_.find<J>(bytes);
  }

 private:
  ByteTable bytes_;
  FloatTable floats_;
};

struct Float8Codes : EightBits {
  static constexpr bool kZeroPoints = false;
  static constexpr int kBias = 0;

  explicit Float8Codes(const PanelJob&) {}
  template <int J>
  QSERVE_INLINE_METHOD F value(I bytes, F) const {
    return float8_value<J>(bytes);
  }
};

}  // namespace
}  // namespace qserve::QSERVE_NAMESPACE
