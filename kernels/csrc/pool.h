// Our own threads: fork-join over numbered tasks.
#pragma once

#include <cstdint>

namespace qserve {

// Runs task(context, i) for every i below count, on the calling thread and the workers, and returns when all are done.
//
// Each thread has a share of neighbouring tasks, and takes from the others when it is done with it, so a worker that the system
// has put aside holds up one task and not its share; which thread runs a task must not matter to the result. Workers wait for the
// next call by spinning for kSpin, then they sleep: an idle process uses no processor. Calls from several threads at once are
// safe: one of them gets the workers, the others run their tasks alone. A forked child starts with workers of its own.
void run_tasks(int64_t count, void (*task)(void*, int64_t), void* context);

template <typename Function>
void run_tasks(int64_t count, const Function& function) {
  const auto call = [](void* context, int64_t i) { (*static_cast<const Function*>(context))(i); };
  run_tasks(count, call, const_cast<Function*>(&function));
}

// Threads in use, the calling one included. At first the processors this process may run on.
int num_threads();
void set_num_threads(int count);

}  // namespace qserve
