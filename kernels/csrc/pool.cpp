#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qserve {
namespace {

// Longer than the pause between two ops of a step (some microseconds of Python), shorter than anybody notices.
constexpr std::chrono::microseconds kSpin{80};
constexpr int kPausesPerLook = 32;
constexpr int kMaxThreads = 256;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The call in progress in one word: 24 bits that count calls, 20 bits for the number of tasks, 20 bits for the next task.
// A task is claimed by exchanging the word for its successor, which fails if the call is over: a late worker can
// neither take a task twice nor touch the next call with what it knows of the last.
constexpr int kTaskBits = 20;
constexpr uint64_t kTaskMask = (uint64_t{1} << kTaskBits) - 1;
constexpr int64_t kMaxTasks = int64_t{kTaskMask};

uint64_t next_task(uint64_t word) { return word & kTaskMask; }
uint64_t task_count(uint64_t word) { return (word >> kTaskBits) & kTaskMask; }
uint64_t call_number(uint64_t word) { return word >> (2 * kTaskBits); }

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {}

  int threads() const { return threads_.load(std::memory_order_relaxed); }

  void resize(int threads) {
    std::lock_guard lock(calls_);
    stop_workers();
    threads_.store(threads, std::memory_order_relaxed);
  }

  void run(int64_t count, void (*task)(void*, int64_t), void* context) {
    std::unique_lock lock(calls_, std::defer_lock);
    if (count <= 1 || count > kMaxTasks || threads() == 1 || !lock.try_lock()) {
      for (int64_t i = 0; i < count; ++i) task(context, i);
      return;
    }
    if (workers_.empty()) start_workers();
    task_ = task;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t call = call_number(word_.load(std::memory_order_relaxed)) + 1;
    word_.store((call << (2 * kTaskBits)) | (uint64_t(count) << kTaskBits));
    if (sleepers_.load() > 0) wake();
    while (take_task()) {
    }
    wait_for(count);
  }

 private:
  bool take_task() {
    uint64_t word = word_.load(std::memory_order_acquire);
    while (next_task(word) < task_count(word)) {
      if (!word_.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) continue;
      task_(context_, int64_t(next_task(word)));
      done_.fetch_add(1, std::memory_order_release);
      return true;
    }
    return false;
  }

  bool has_task() const {
    const uint64_t word = word_.load();
    return next_task(word) < task_count(word);
  }

  void wait_for(int64_t count) {
    for (int looks = 0; done_.load(std::memory_order_acquire) != count; ++looks) {
      pause();
      if (looks > 4096) std::this_thread::yield();  // the last task is on a thread that the system has put aside
    }
  }

  void work() {
    using Clock = std::chrono::steady_clock;
    Clock::time_point idle_since = Clock::now();
    while (!stopping_.load(std::memory_order_relaxed)) {
      if (take_task()) {
        while (take_task()) {
        }
        idle_since = Clock::now();
      }
      for (int i = 0; i < kPausesPerLook && !has_task(); ++i) pause();
      if (!has_task() && Clock::now() - idle_since > kSpin) {
        sleep();
        idle_since = Clock::now();
      }
    }
  }

  // A caller that does not see the sleeper has published its call before the sleeper looks, and the other way round.
  void sleep() {
    std::unique_lock lock(sleep_);
    sleepers_.fetch_add(1);
    awake_.wait(lock, [this] { return has_task() || stopping_.load(); });
    sleepers_.fetch_sub(1);
  }

  void wake() {
    { std::lock_guard lock(sleep_); }
    awake_.notify_all();
  }

  void start_workers() {
    stopping_.store(false);
    for (int i = 1; i < threads(); ++i) workers_.emplace_back([this] { work(); });
  }

  void stop_workers() {
    stopping_.store(true);
    wake();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  std::mutex calls_;
  std::vector<std::thread> workers_;
  std::atomic<int> threads_;
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> word_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::mutex sleep_;
  std::condition_variable awake_;
};

Pool* current = nullptr;  // never freed: workers may outlive static objects at exit

void replace_after_fork() { current = new Pool(current->threads()); }

Pool& pool() {
  static const bool ready = [] {
    current = new Pool(std::clamp(int(std::thread::hardware_concurrency()), 1, kMaxThreads));
    pthread_atfork(nullptr, nullptr, replace_after_fork);
    return true;
  }();
  (void)ready;
  return *current;
}

}  // namespace

void run_tasks(int64_t count, void (*task)(void*, int64_t), void* context) { pool().run(count, task, context); }

int num_threads() { return pool().threads(); }

void set_num_threads(int count) { pool().resize(std::clamp(count, 1, kMaxThreads)); }

}  // namespace qserve
