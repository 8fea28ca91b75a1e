#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "dispatch.h"
#include "panel_layout.h"
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
constexpr int64_t kTasksPerThread = 16;

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

int64_t inputs_of(const PanelJob& job) { return job.padded_k; }
int64_t inputs_of(const DenseJob& job) { return job.k; }

// Panels that a kernel computes together.
int64_t panels_together(const PanelJob&) { return 1; }
int64_t panels_together(const DenseJob&) { return 4; }

// Splits rows and panels into tasks and runs them.
template <typename Job>
void run_tiles(const Job& job, int64_t num_panels, void (*kernel)(const Job&, const TileRange&), OutputSink* sink) {
  if (job.rows * num_panels * kPanel * inputs_of(job) < kAloneWork) {
    run_tile(job, {0, job.rows, 0, num_panels}, kernel, sink, 0);
    return;
  }
  const int64_t row_tasks = divide_up(job.rows, kRowsPerTask);
  int64_t wanted = divide_up(kTasksPerThread * num_threads(), row_tasks);
  if (sink != nullptr) wanted = std::min(wanted, sink->num_slots());
  const int64_t together = num_panels >= panels_together(job) * wanted ? panels_together(job) : 1;
  const int64_t panels_per_task = round_up(divide_up(num_panels, wanted), together);
  const int64_t panel_tasks = divide_up(num_panels, panels_per_task);
  // By value: another thread gets all of it at once, and not one address after the other.
  run_tasks(row_tasks * panel_tasks, [=](int64_t task) {
    const int64_t row = task / panel_tasks * kRowsPerTask, slot = task % panel_tasks, panel = slot * panels_per_task;
    const TileRange range{row, std::min(row + kRowsPerTask, job.rows), panel, std::min(panel + panels_per_task, num_panels)};
    run_tile(job, range, kernel, sink, slot);
  });
}

// A number for each output, up to whole panels.
void pack_bias(uint8_t* to, const float* bias, int64_t out_features, int64_t num_panels) {
  std::memset(to, 0, num_panels * kPanel * sizeof(float));
  std::memcpy(to, bias, out_features * sizeof(float));
}

int lines_of(PanelFormat format) {  // of 64 bytes, for 32 inputs of a panel: kLines of panel_formats.h
  switch (format) {
    case PanelFormat::kInt2:
      return 2;
    case PanelFormat::kInt3:
      return 3;
    case PanelFormat::kInt4:
    case PanelFormat::kCodebook:
      return 4;
    default:
      return 8;
  }
}

bool has_zero_points(PanelFormat format) {
  return format <= PanelFormat::kInt4 || format == PanelFormat::kInt8Zeros;
}

// Adds a code to the lines (still zero where it goes) of its 32 inputs; byte: its input's place in a quad of its output.
void put_code(PanelFormat format, uint8_t* lines, int64_t quad, int64_t byte, uint8_t code) {
  switch (lines_of(format)) {
    case 3:
      lines[128 + byte] |= uint8_t(code >> 2 << quad);
      code &= 3;
      [[fallthrough]];
    case 2:
      lines[quad / 4 * 64 + byte] |= uint8_t(code << quad % 4 * 2);
      break;
    case 4:
      lines[quad / 2 * 64 + byte] |= uint8_t(code << quad % 2 * 4);
      break;
    default:
      lines[quad * 64 + byte] = code;
  }
}

}  // namespace

PanelWeight::PanelWeight(const PanelSizes& sizes) : sizes_(sizes) {
  const auto [n, k, format, group, wide, bias, ordered] = sizes;
  if (n < 1 || k < 1 || group < 1 || (group % kActivationGroup && group != k) || int(format) < 0 || int(format) >= kPanelFormats)
    throw std::invalid_argument("a weight needs outputs, inputs, and groups of a multiple of 32 or of all inputs");
  num_panels_ = divide_up(n, kPanel);
  job_.group_size = round_up(group, kActivationGroup);
  job_.num_groups = divide_up(k, group);
  job_.padded_k = job_.num_groups * job_.group_size;
  job_.out_features = n;
  job_.wide = wide;
  job_.number_bytes = kPanel * ((wide ? 4 : 2) + (has_zero_points(format) ? 1 : 0));
  job_.code_bytes = job_.group_size / kActivationGroup * lines_of(format) * kLine;
  job_.panel_bytes = place_of_group(job_, job_.num_groups - 1).codes + job_.code_bytes;
  order_offset_ = bias ? num_panels_ * kPanel * int64_t(sizeof(float)) : 0;
  codebook_offset_ = order_offset_ + (ordered ? round_up(k * sizeof(int32_t), 64) : 0);
  panels_offset_ = codebook_offset_ + (format == PanelFormat::kCodebook ? 128 : 0);
  set_nbytes(panels_offset_ + num_panels_ * job_.panel_bytes);
}

void PanelWeight::pack(const PanelSource& source) {
  uint8_t* layout = allocate();
  if (sizes_.bias) pack_bias(layout, source.bias, sizes_.out_features, num_panels_);
  if (sizes_.ordered) {
    auto* order = reinterpret_cast<int32_t*>(layout + order_offset_);
    std::copy(source.input_order, source.input_order + sizes_.in_features, order);
  }
  if (sizes_.format == PanelFormat::kCodebook) {
    std::memcpy(layout + codebook_offset_, source.codebook, 64);
    uint8_t* bytes = layout + codebook_offset_ + 64;
    for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(128 + std::lrint(source.codebook[i]));
  }
  uint8_t* panels = layout + panels_offset_;
  run_tasks(num_panels_, [&](int64_t p) { pack_panel(panels + p * job_.panel_bytes, p, source); });
}

void PanelWeight::pack_panel(uint8_t* panel, int64_t p, const PanelSource& source) const {
  std::memset(panel, 0, job_.panel_bytes);
  const int64_t block_bytes = lines_of(sizes_.format) * kLine;
  for (int64_t lane = 0; lane < std::min(kPanel, job_.out_features - p * kPanel); ++lane) {
    const int64_t row = p * kPanel + lane;
    const uint8_t* codes = source.codes + row * sizes_.in_features;
    for (int64_t g = 0; g < job_.num_groups; ++g) {
      const GroupPlace place = place_of_group(job_, g);
      const int64_t from = row * job_.num_groups + g, first = g * job_.group_size;
      if (job_.wide) {
        std::memcpy(panel + place.scales + 4 * lane, source.scales + from, 4);
      } else {
        const uint16_t half = to_half(source.scales[from]);
        std::memcpy(panel + place.scales + 2 * lane, &half, 2);
      }
      if (has_zero_points(sizes_.format)) panel[place.zero_points + lane] = source.zero_points[from];
      for (int64_t k = 0; k < std::min(job_.group_size, sizes_.in_features - first); ++k) {
        uint8_t* lines = panel + place.codes + k / kActivationGroup * block_bytes;
        put_code(sizes_.format, lines, k % kActivationGroup / 4, 4 * lane + k % 4, codes[first + k]);
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
  const int format = int(sizes_.format);
  const Activations activations = product.activations;
  const bool integer = activations == Activations::kInt8 || activations == Activations::kInt8Token;
  PanelJob job = job_;
  job.panels = data() + panels_offset_;
  job.bias = sizes_.bias ? reinterpret_cast<const float*>(data()) : nullptr;
  job.codebook = reinterpret_cast<const float*>(data() + codebook_offset_);
  job.byte_codebook = data() + codebook_offset_ + 64;
  job.x = product.x;
  job.x_stride = product.x_stride;
  job.rows = product.rows;
  job.out = product.out;
  job.out_stride = product.out_stride;
  RoundJob rounding{.x = job.x,
                    .x_stride = job.x_stride,
                    .k = sizes_.in_features,
                    .rows = job.rows,
                    .activations = activations,
                    .to = {.padded_k = job.padded_k, .group_size = job.group_size},
                    .floats = nullptr};
  if (integer && table.quantized[format] != nullptr) {
    const size_t codes = job.rows * job.padded_k, groups = codes / kActivationGroup, sums = job.rows * job.num_groups;
    Pieces pieces(scratch(ScratchUse::kCall, Pieces::size<int8_t>(codes) + 2 * Pieces::size<float>(groups) +
                                                 Pieces::size<float>(sums)));
    rounding.to.codes = pieces.take<int8_t>(codes);
    rounding.to.scales = pieces.take<float>(groups);
    rounding.to.offsets = pieces.take<int32_t>(groups);
    rounding.to.group_sums = pieces.take<float>(sums);
    round_some(rounding, table.quantize_rows);
    job.quantized = rounding.to;
    run_tiles(job, num_panels_, table.quantized[format], product.sink);
    return;
  }
  if (activations != Activations::kFloat32 || sizes_.ordered || job.padded_k != sizes_.in_features) {
    rounding.floats = reinterpret_cast<float*>(scratch(ScratchUse::kCall, job.rows * job.padded_k * sizeof(float)));
    round_some(rounding, table.round_rows);
    job.x = rounding.floats;
    job.x_stride = job.padded_k;
  }
  run_tiles(job, num_panels_, table.exact[format], product.sink);
}

void PanelWeight::round_some(const RoundJob& job, void (*round)(const RoundJob&, int64_t, int64_t)) const {
  const int64_t rows_per_task = std::max(kRowBlock, round_up(kAloneWork / job.k, kRowBlock));
  run_tasks(divide_up(job.rows, rows_per_task), [&](int64_t task) {
    const int64_t begin = task * rows_per_task, end = std::min(begin + rows_per_task, job.rows);
    if (!sizes_.ordered) return round(job, begin, end);
    auto* ordered = reinterpret_cast<float*>(scratch(ScratchUse::kTask, (end - begin) * job.k * sizeof(float)));
    const auto* order = reinterpret_cast<const int32_t*>(data() + order_offset_);
    for (int64_t row = begin; row < end; ++row) {
      const float* x = job.x + row * job.x_stride;
      float* to = ordered + (row - begin) * job.k;
      for (int64_t k = 0; k < job.k; ++k) to[k] = x[order[k]];
    }
    RoundJob some = job;
    some.x = ordered - begin * job.k;
    some.x_stride = job.k;
    round(some, begin, end);
  });
}

DenseWeight::DenseWeight(int64_t out_features, int64_t in_features, FloatType type, bool bias) : bias_(bias) {
  if (out_features < 1 || in_features < 1) throw std::invalid_argument("a weight needs outputs and inputs");
  num_panels_ = divide_up(out_features, kPanel);
  job_.type = type;
  job_.k = in_features;
  job_.out_features = out_features;
  bias_offset_ = round_up(num_panels_ * kPanel * job_.k * (type == FloatType::kFloat32 ? 4 : 2), 64);
  set_nbytes(bias_offset_ + (bias ? num_panels_ * kPanel * int64_t(sizeof(float)) : 0));
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

void DenseWeight::pack(const void* weight, const float* bias) {
  uint8_t* panels = allocate();
  if (bias_) pack_bias(panels + bias_offset_, bias, job_.out_features, num_panels_);
  if (job_.type == FloatType::kFloat32) {
    auto* to = reinterpret_cast<uint32_t*>(panels);
    pack_floats(to, static_cast<const uint32_t*>(weight), num_panels_, job_.out_features, job_.k);
  } else {
    auto* to = reinterpret_cast<uint16_t*>(panels);
    pack_floats(to, static_cast<const uint16_t*>(weight), num_panels_, job_.out_features, job_.k);
  }
}

void DenseWeight::multiply(const Product& product) const {
  DenseJob job = job_;
  job.panels = data();
  job.bias = bias_ ? reinterpret_cast<const float*>(data() + bias_offset_) : nullptr;
  job.x = product.x;
  job.x_stride = product.x_stride;
  job.rows = product.rows;
  job.out = product.out;
  job.out_stride = product.out_stride;
  run_tiles(job, num_panels_, kernels().matmul.dense, product.sink);
}

}  // namespace qserve
