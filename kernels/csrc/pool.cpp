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

// What is left of a thread's share of a call, in one word: 24 bits that count calls, 20 bits for the end, 20 for the next task.
// A task is claimed by exchanging the word for its successor, which fails once another thread has claimed one or the call is
// over: a late thread can neither take a task twice nor touch the next call with what it knows of the last.
constexpr int kTaskBits = 20;
constexpr int64_t kMaxTasks = (int64_t{1} << kTaskBits) - 1;

class alignas(64) Share {
 public:
  void set(uint64_t call, int64_t begin, int64_t end) {
    word_.store((call << (2 * kTaskBits)) | (uint64_t(end) << kTaskBits) | uint64_t(begin));
  }

  bool has_task() const {
    const uint64_t word = word_.load();
    return next(word) < end(word);
  }

  // A task from one of the ends, or -1 if none is left. The owner takes the first, so that memory passes by in one stream; who has
  // nothing left of its own takes the last.
  int64_t claim(bool is_owner) {
    uint64_t word = word_.load(std::memory_order_acquire);
    while (next(word) < end(word)) {
      const uint64_t rest = is_owner ? word + 1 : word - (uint64_t{1} << kTaskBits);
      if (word_.compare_exchange_weak(word, rest, std::memory_order_acq_rel)) return is_owner ? next(word) : end(word) - 1;
    }
    return -1;
  }

 private:
  static int64_t next(uint64_t word) { return int64_t(word) & kMaxTasks; }
  static int64_t end(uint64_t word) { return int64_t(word >> kTaskBits) & kMaxTasks; }

  std::atomic<uint64_t> word_{0};
};

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
    ++call_;
    for (int i = 0; i < threads(); ++i) shares_[i].set(call_, first_task(i, count), first_task(i + 1, count));
    if (sleepers_.load() > 0) wake();
    run_some(0);
    wait_for(count);
  }

 private:
  // Where the share of a thread begins; all are of one size, give or take a task.
  int64_t first_task(int64_t thread, int64_t count) const { return (thread * count + threads() - 1) / threads(); }

  // Runs tasks of the call in progress until none is left, those of its own share first. Returns whether there was one.
  bool run_some(int thread) {
    int64_t count = 0;
    for (int i = 0; i < threads(); ++i) {
      Share& share = shares_[(thread + i) % threads()];
      for (int64_t task; (task = share.claim(i == 0)) >= 0; ++count) task_(context_, task);
    }
    if (count > 0) done_.fetch_add(count, std::memory_order_release);
    return count > 0;
  }

  void wait_for(int64_t count) {
    for (int looks = 0; done_.load(std::memory_order_acquire) != count; ++looks) {
      pause();
      if (looks > 4096) std::this_thread::yield();  // the last task is on a thread that the system has put aside
    }
  }

  void work(int thread) {
    using Clock = std::chrono::steady_clock;
    const Share& share = shares_[thread];
    Clock::time_point idle_since = Clock::now();
    while (!stopping_.load(std::memory_order_relaxed)) {
      for (int i = 0; i < kPausesPerLook && !share.has_task(); ++i) pause();
      if (share.has_task() && run_some(thread)) {
        idle_since = Clock::now();
      } else if (Clock::now() - idle_since > kSpin) {
        sleep(share);
        idle_since = Clock::now();
      }
    }
  }

  // A caller that does not see the sleeper has published its call before the sleeper looks, and the other way round.
  void sleep(const Share& share) {
    std::unique_lock lock(sleep_);
    sleepers_.fetch_add(1);
    awake_.wait(lock, [&] { return share.has_task() || stopping_.load(); });
    sleepers_.fetch_sub(1);
  }

  void wake() {
    { std::lock_guard lock(sleep_); }
    awake_.notify_all();
  }

  void start_workers() {
    stopping_.store(false);
    shares_ = std::vector<Share>(threads());
    for (int i = 1; i < threads(); ++i) workers_.emplace_back([this, i] { work(i); });
  }

  void stop_workers() {
    stopping_.store(true);
    wake();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  std::mutex calls_;
  std::vector<std::thread> workers_;
  std::vector<Share> shares_;
  std::atomic<int> threads_;
  uint64_t call_ = 0;
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
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
