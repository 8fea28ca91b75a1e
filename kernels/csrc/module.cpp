// The Python face of the native CPU kernels: plain numbers and addresses in, no knowledge of torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"
#include "matmul.h"
#include "pool.h"
#include "program.h"
#include "sequence_ops.h"

namespace nb = nanobind;
using qserve::CacheView;
using qserve::DenseWeight;
using qserve::FloatType;
using qserve::PanelWeight;
using qserve::Program;

namespace {

constexpr int kAbiVersion = 4;  // raised when a signature or a layout changes; qserve.kernels.native knows it

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct Int4Weight : PanelWeight {
  Int4Weight(int64_t n, int64_t k, int64_t group, bool wide) : PanelWeight(4, n, k, group, wide) {}
};

struct Int8Weight : PanelWeight {
  Int8Weight(int64_t n, int64_t k, int64_t group, bool wide) : PanelWeight(8, n, k, group, wide) {}
};

void multiply(const PanelWeight& weight, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t out, int64_t out_stride,
              bool quantized) {
  Program::run_or_note(
      [=, &weight] { weight.multiply(at<const float>(x), x_stride, rows, at<float>(out), out_stride, quantized); });
}

void bind_weights(nb::module_& m) {
  using Released = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<PanelWeight>(m, "PanelWeight")
      .def_prop_ro("nbytes", &PanelWeight::nbytes)
      .def("run", &multiply, Released());
  nb::class_<Int4Weight, PanelWeight>(m, "Int4Weight")
      .def(nb::init<int64_t, int64_t, int64_t, bool>())
      .def(
          "pack",
          [](Int4Weight& w, uintptr_t codes, uintptr_t scales, uintptr_t zero_points) {
            w.pack(at<const uint8_t>(codes), at<const float>(scales), at<const uint8_t>(zero_points));
          },
          Released());
  nb::class_<Int8Weight, PanelWeight>(m, "Int8Weight")
      .def(nb::init<int64_t, int64_t, int64_t, bool>())
      .def(
          "pack",
          [](Int8Weight& w, uintptr_t codes, uintptr_t scales) {
            w.pack(at<const uint8_t>(codes), at<const float>(scales), nullptr);
          },
          Released());
  nb::enum_<FloatType>(m, "FloatType")
      .value("FLOAT32", FloatType::kFloat32)
      .value("FLOAT16", FloatType::kFloat16)
      .value("BFLOAT16", FloatType::kBfloat16);
  nb::class_<DenseWeight>(m, "DenseWeight")
      .def(nb::init<int64_t, int64_t, FloatType>())
      .def_prop_ro("nbytes", &DenseWeight::nbytes)
      .def(
          "pack", [](DenseWeight& w, uintptr_t from) { w.pack(at<const void>(from)); },
          Released())
      .def(
          "run",
          [](const DenseWeight& w, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t out, int64_t out_stride) {
            Program::run_or_note(
                [=, &w] { w.multiply(at<const float>(x), x_stride, rows, at<float>(out), out_stride); });
          },
          Released());
}

void rms_norm(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, uintptr_t weight, float eps,
              uintptr_t out, int64_t out_stride, int64_t rows, int64_t width) {
  const qserve::NormJob job{.x = at<const float>(x),
                            .x_stride = x_stride,
                            .residual = at<float>(residual),
                            .residual_stride = residual_stride,
                            .weight = at<const float>(weight),
                            .eps = eps,
                            .out = at<float>(out),
                            .out_stride = out_stride,
                            .width = width};
  Program::run_or_note([=] { qserve::rms_norm(job, rows); });
}

void silu_mul(uintptr_t gate_up, int64_t x_stride, uintptr_t out, int64_t out_stride, int64_t rows, int64_t width) {
  const qserve::SiluJob job{.gate_up = at<const float>(gate_up),
                            .x_stride = x_stride,
                            .out = at<float>(out),
                            .out_stride = out_stride,
                            .width = width};
  Program::run_or_note([=] { qserve::silu_mul(job, rows); });
}

void rope_and_store(uintptr_t qkv, int64_t stride, int64_t num_tokens, int64_t width, uintptr_t positions,
                    uintptr_t slots, uintptr_t cos_sin, int64_t max_positions, const CacheView& cache) {
  const qserve::RopeJob job{.qkv = at<float>(qkv),
                            .stride = stride,
                            .num_heads = width / cache.head_dim - 2 * cache.num_kv_heads,
                            .positions = at<const int32_t>(positions),
                            .slots = at<const int32_t>(slots),
                            .cos_sin = at<const float>(cos_sin),
                            .cache = cache};
  Program::run_or_note([=] { qserve::rope_and_store(job, num_tokens, max_positions); });
}

void paged_attention(uintptr_t q, int64_t q_stride, int64_t num_rows, int64_t width, const CacheView& cache,
                     uintptr_t block_tables, int64_t max_blocks, uintptr_t context_lens, uintptr_t starts,
                     int64_t num_sequences, float scale, uintptr_t out, int64_t out_stride) {
  const qserve::AttentionJob job{.q = at<const float>(q),
                                 .q_stride = q_stride,
                                 .out = at<float>(out),
                                 .out_stride = out_stride,
                                 .heads_per_kv = width / cache.head_dim / cache.num_kv_heads,
                                 .scale = scale,
                                 .cache = cache};
  const qserve::RaggedBatch batch{.block_tables = at<const int32_t>(block_tables),
                                  .max_blocks = max_blocks,
                                  .context_lens = at<const int32_t>(context_lens),
                                  .starts = at<const int32_t>(starts),
                                  .num_sequences = num_sequences,
                                  .num_rows = num_rows};
  Program::run_or_note([=] { qserve::paged_attention(job, batch); });
}

void bind_cache(nb::module_& m) {
  nb::class_<CacheView>(m, "LayerCache")
      .def("__init__", [](CacheView* self, uintptr_t k, uintptr_t v, int64_t num_blocks, int64_t num_kv_heads,
                          int64_t block_size, int64_t head_dim, FloatType type) {
        new (self) CacheView{at<void>(k), at<void>(v), num_blocks, num_kv_heads, block_size, head_dim, type};
      });
}

void bind_program(nb::module_& m) {
  nb::class_<Program>(m, "Program")
      .def(nb::init<>())
      .def("begin", &Program::begin)
      .def("end", &Program::end)
      .def("run", &Program::run, nb::call_guard<nb::gil_scoped_release>())
      .def("__len__", &Program::size);
}

}  // namespace

NB_MODULE(_cpu, m) {
  using Released = nb::call_guard<nb::gil_scoped_release>;
  m.def("abi_version", [] { return kAbiVersion; });
  m.def("isa", [] { return std::string(qserve::kernels().name); });
  m.def("supported_isas", &qserve::supported_isas);
  m.def("select_isa", &qserve::select_isa);
  m.def("num_threads", &qserve::num_threads);
  m.def("set_num_threads", &qserve::set_num_threads, Released());
  bind_weights(m);
  bind_cache(m);
  bind_program(m);
  m.def("rms_norm", &rms_norm, Released());
  m.def("silu_mul", &silu_mul, Released());
  m.def("rope_and_store", &rope_and_store, Released());
  m.def("paged_attention", &paged_attention, Released());
}
