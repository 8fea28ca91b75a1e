#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace qserve {
namespace {

const KernelTable kPortable{"portable", portable::kMatmulKernels, portable::kAttentionKernels, portable::kRowKernels,
                            portable::kProbeKernels};
#if defined(QSERVE_X86)
const KernelTable kAvx2{"avx2", avx2::kMatmulKernels, avx2::kAttentionKernels, avx2::kRowKernels, avx2::kProbeKernels};
const KernelTable kAvx512{"avx512-vnni", avx512::kMatmulKernels, avx512::kAttentionKernels, avx512::kRowKernels,
                          avx512::kProbeKernels};
#endif

std::vector<const KernelTable*> find_tables() {
  std::vector<const KernelTable*> tables;
#if defined(QSERVE_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    tables.push_back(&kAvx512);
  if (avx2) tables.push_back(&kAvx2);
#endif
  tables.push_back(&kPortable);
  return tables;
}

const std::vector<const KernelTable*>& tables() {
  static const std::vector<const KernelTable*> found = find_tables();
  return found;
}

std::atomic<const KernelTable*>& selected() {
  static std::atomic<const KernelTable*> table{tables().front()};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *selected().load(std::memory_order_relaxed); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : tables()) names.emplace_back(table->name);
  return names;
}

void select_isa(const std::string& name) {
  std::string known;
  for (const KernelTable* table : tables()) {
    if (table->name == name) {
      selected().store(table);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument("QSERVE_ISA names the instruction set '" + name + "', this machine has: " + known);
}

}  // namespace qserve
