#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "dispatch.h"
#include "pool.h"
#include "scratch.h"

namespace qserve {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Products below this many multiplications are done before a worker has noticed.
constexpr int64_t kAloneWork = 40'000;
// Rows that are rounded to int8 at a time: bounds the scratch memory; the weight is read again for the next ones.
constexpr int64_t kRowsAtOnce = 512;
// Rows of a task: their int8 codes stay in the second-level cache while panels pass by.
constexpr int64_t kRowsPerTask = 128;
// Tasks for each thread: enough to even out threads that run at different speeds.
constexpr int64_t kTasksPerThread = 4;

// Round halves of float16 to nearest even; scales were checked to be representable, so nothing is lost.
uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude >= 0x7F800000) return uint16_t(sign | 0x7C00 | (magnitude > 0x7F800000 ? 0x200 : 0));
  if (magnitude >= 0x38800000) return uint16_t(sign | ((magnitude - 0x38000000) >> 13));
  float scaled;
  std::memcpy(&scaled, &magnitude, 4);
  return uint16_t(sign | uint32_t(scaled * 0x1p24f));
}

// Panels whose outputs a sink gets together.
constexpr int64_t kPanelsAtOnce = 16;

// Panels of a task, for a sink a few at a time.
template <typename Job>
void run_tile(const Job& job, const TileRange& range, void (*kernel)(const Job&, const TileRange&), OutputSink* sink,
              int64_t slot) {
  if (sink == nullptr) return kernel(job, range);
  constexpr int64_t stride = kPanelsAtOnce * kPanel;
  const int64_t rows = range.row_end - range.row_begin;
  auto* values = reinterpret_cast<float*>(scratch(ScratchUse::kTask, rows * stride * sizeof(float)));
  Job piece = job;
  piece.out_stride = stride;
  for (int64_t panel = range.panel_begin; panel < range.panel_end; panel += kPanelsAtOnce) {
    const int64_t end = std::min(panel + kPanelsAtOnce, range.panel_end), column = panel * kPanel;
    piece.out = values - range.row_begin * stride - column;
    kernel(piece, {range.row_begin, range.row_end, panel, end});
    sink->take({.values = values,
                .stride = stride,
                .row = range.row_begin,
                .num_rows = rows,
                .column = column,
                .num_columns = std::min(end * kPanel, job.out_features) - column,
                .slot = slot});
  }
}

// Splits rows and panels into tasks and runs them.
template <typename Job>
void run_tiles(const Job& job, int64_t num_panels, void (*kernel)(const Job&, const TileRange&), OutputSink* sink) {
  if (job.rows * num_panels * kPanel * job.k < kAloneWork) {
    run_tile(job, {0, job.rows, 0, num_panels}, kernel, sink, 0);
    return;
  }
  const int64_t row_tasks = divide_up(job.rows, kRowsPerTask);
  int64_t wanted = divide_up(kTasksPerThread * num_threads(), row_tasks);
  if (sink != nullptr) wanted = std::min(wanted, sink->num_slots());
  const int64_t panels_per_task = round_up(divide_up(num_panels, wanted), num_panels >= 4 * wanted ? 4 : 1);
  const int64_t panel_tasks = divide_up(num_panels, panels_per_task);
  run_tasks(row_tasks * panel_tasks, [&](int64_t task) {
    const int64_t row = task / panel_tasks * kRowsPerTask, slot = task % panel_tasks, panel = slot * panels_per_task;
    const TileRange range{row, std::min(row + kRowsPerTask, job.rows), panel, std::min(panel + panels_per_task, num_panels)};
    run_tile(job, range, kernel, sink, slot);
  });
}

}  // namespace

PanelWeight::PanelWeight(int bits, int64_t out_features, int64_t in_features, int64_t group_size, bool wide)
    : bits_(bits) {
  if (out_features < 1 || in_features < 1 || group_size < 1 || group_size % kActivationGroup)
    throw std::invalid_argument("a weight needs outputs, inputs and groups of a multiple of 32");
  num_panels_ = divide_up(out_features, kPanel);
  job_.k = in_features;
  job_.group_size = group_size;
  job_.num_groups = divide_up(in_features, group_size);
  job_.out_features = out_features;
  job_.wide = wide;
  padded_k_ = job_.num_groups * group_size;
  const int64_t scale_bytes = job_.num_groups * kPanel * (wide ? 4 : 2);
  job_.zeros_offset = scale_bytes;
  job_.codes_offset = round_up(scale_bytes + (bits == 4 ? job_.num_groups * kPanel : 0), 64);
  job_.panel_bytes = job_.codes_offset + padded_k_ * kPanel * bits / 8;
  set_nbytes(num_panels_ * job_.panel_bytes);
}

void PanelWeight::pack(const uint8_t* codes, const float* scales, const uint8_t* zero_points) {
  uint8_t* panels = allocate();
  run_tasks(num_panels_, [&](int64_t p) { pack_panel(panels + p * job_.panel_bytes, p, codes, scales, zero_points); });
}

void PanelWeight::pack_panel(uint8_t* panel, int64_t p, const uint8_t* codes, const float* scales,
                             const uint8_t* zero_points) const {
  std::memset(panel, 0, job_.panel_bytes);
  if (bits_ == 8) std::memset(panel + job_.codes_offset, 128, padded_k_ * kPanel);  // zeros, with the bias
  for (int64_t lane = 0; lane < std::min(kPanel, job_.out_features - p * kPanel); ++lane) {
    const int64_t row = p * kPanel + lane;
    for (int64_t g = 0; g < job_.num_groups; ++g) {
      const float scale = scales[row * job_.num_groups + g];
      const int64_t at = g * kPanel + lane;
      if (job_.wide) {
        std::memcpy(panel + 4 * at, &scale, 4);
      } else {
        const uint16_t half = to_half(scale);
        std::memcpy(panel + 2 * at, &half, 2);
      }
      if (bits_ == 4) panel[job_.zeros_offset + at] = zero_points[row * job_.num_groups + g];
    }
    const uint8_t* from = codes + row * job_.k;
    uint8_t* to = panel + job_.codes_offset + 4 * lane;
    for (int64_t k = 0; k < job_.k; ++k) {
      if (bits_ == 4) {
        to[k / 8 * 64 + k % 4] |= uint8_t((from[k] & 15) << (k / 4 % 2 * 4));
      } else {
        to[k / 4 * 64 + k % 4] = from[k] ^ 128;
      }
    }
  }
}

void PanelWeight::multiply(const Product& product) const {
  if (product.sink != nullptr) return multiply_some(product);  // which has room for a limited number of rows itself
  for (int64_t row = 0; row < product.rows; row += kRowsAtOnce) {
    Product some = product;
    some.rows = std::min(kRowsAtOnce, product.rows - row);
    some.x += row * product.x_stride;
    some.out += row * product.out_stride;
    multiply_some(some);
  }
}

void PanelWeight::multiply_some(const Product& product) const {
  const MatmulKernels& table = kernels().matmul;
  PanelJob job = job_;
  job.panels = data();
  job.x = product.x;
  job.x_stride = product.x_stride;
  job.rows = product.rows;
  job.out = product.out;
  job.out_stride = product.out_stride;
  if (!product.quantized) {
    run_tiles(job, num_panels_, bits_ == 4 ? table.int4_exact : table.int8_exact, product.sink);
    return;
  }
  const size_t codes = job.rows * padded_k_, groups = codes / kActivationGroup, sums = job.rows * job.num_groups;
  Pieces pieces(scratch(ScratchUse::kCall, Pieces::size<int8_t>(codes) + 2 * Pieces::size<float>(groups) +
                                               Pieces::size<float>(sums)));
  job.quantized = {.codes = pieces.take<int8_t>(codes),
                   .scales = pieces.take<float>(groups),
                   .offsets = pieces.take<int32_t>(groups),
                   .group_sums = pieces.take<float>(sums),
                   .padded_k = padded_k_,
                   .group_size = job.group_size};
  const QuantizeJob rounding{.x = job.x, .x_stride = job.x_stride, .k = job.k, .rows = job.rows, .to = job.quantized};
  const int64_t rows_per_task = std::max(kRowBlock, round_up(kAloneWork / job.k, kRowBlock));
  run_tasks(divide_up(job.rows, rows_per_task), [&](int64_t task) {
    const int64_t row = task * rows_per_task;
    table.quantize_rows(rounding, row, std::min(row + rows_per_task, job.rows));
  });
  run_tiles(job, num_panels_, bits_ == 4 ? table.int4_quantized : table.int8_quantized, product.sink);
}

DenseWeight::DenseWeight(int64_t out_features, int64_t in_features, FloatType type) {
  if (out_features < 1 || in_features < 1) throw std::invalid_argument("a weight needs outputs and inputs");
  num_panels_ = divide_up(out_features, kPanel);
  job_.type = type;
  job_.k = in_features;
  job_.out_features = out_features;
  set_nbytes(num_panels_ * kPanel * job_.k * (type == FloatType::kFloat32 ? 4 : 2));
}

template <typename T>
static void pack_floats(T* to, const T* from, int64_t num_panels, int64_t out_features, int64_t width) {
  run_tasks(num_panels, [=](int64_t p) {
    T* panel = to + p * width * kPanel;
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t row = p * kPanel + lane;
      for (int64_t k = 0; k < width; ++k) panel[k * kPanel + lane] = row < out_features ? from[row * width + k] : T{0};
    }
  });
}

void DenseWeight::pack(const void* weight) {
  uint8_t* panels = allocate();
  if (job_.type == FloatType::kFloat32) {
    pack_floats(reinterpret_cast<uint32_t*>(panels), static_cast<const uint32_t*>(weight), num_panels_, job_.out_features, job_.k);
  } else {
    pack_floats(reinterpret_cast<uint16_t*>(panels), static_cast<const uint16_t*>(weight), num_panels_, job_.out_features, job_.k);
  }
}

void DenseWeight::multiply(const Product& product) const {
  DenseJob job = job_;
  job.panels = data();
  job.x = product.x;
  job.x_stride = product.x_stride;
  job.rows = product.rows;
  job.out = product.out;
  job.out_stride = product.out_stride;
  run_tiles(job, num_panels_, kernels().matmul.dense, product.sink);
}

}  // namespace qserve
