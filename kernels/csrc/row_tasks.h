// Rows split over the threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pool.h"

namespace qserve {

// Numbers that one thread works through in the time it takes to wake another.
inline constexpr int64_t kNumbersPerTask = 16'384;

template <typename Job>
void run_rows(const Job& job, int64_t rows, int64_t width, void (*kernel)(const Job&, int64_t, int64_t)) {
  const int64_t rows_per_task = std::max<int64_t>(1, kNumbersPerTask / std::max<int64_t>(1, width));
  run_tasks((rows + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    kernel(job, task * rows_per_task, std::min(rows, (task + 1) * rows_per_task));
  });
}

}  // namespace qserve
