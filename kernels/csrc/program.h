// Native calls noted down once and run many times: what a CUDA graph is to a GPU.
#pragma once

#include <cstddef>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace qserve {

// Calls with fixed addresses, in order. What lies at the addresses may change between two runs.
class Program {
 public:
  void run() const {
    for (const auto& call : calls_) call();
  }

  size_t size() const { return calls_.size(); }

  // From here to end(), calls of this thread are noted down in this program and do not run.
  void begin() {
    if (recording()) throw std::logic_error("this thread is recording another program");
    recording() = this;
  }

  void end() { recording() = nullptr; }

  template <typename Call>
  static void run_or_note(Call call) {
    if (Program* program = recording()) {
      program->calls_.emplace_back(std::move(call));
    } else {
      call();
    }
  }

 private:
  static Program*& recording() {
    static thread_local Program* program = nullptr;
    return program;
  }

  std::vector<std::function<void()>> calls_;
};

}  // namespace qserve
