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

// Between two processors a line of memory takes a fifth of a microsecond, a call of a decode step is worth five: what a thread
// has to know comes in one line, and what it writes stays in lines of its own until somebody asks for them.

constexpr int kTaskBits = 20;
constexpr int64_t kMaxTasks = (int64_t{1} << kTaskBits) - 1;

// A call by its number, of which a word has room for 24 bits.
uint64_t numbered(uint64_t call, uint64_t rest) { return (call << (2 * kTaskBits)) | rest; }
uint64_t call_of(uint64_t word) { return word >> (2 * kTaskBits); }
int64_t count_of(uint64_t word) { return int64_t(word) & kMaxTasks; }

// The call in progress, or the last one.
struct alignas(64) Call {
  std::atomic<uint64_t> word{0};  // number and tasks; written last
  void (*task)(void*, int64_t) = nullptr;
  void* context = nullptr;
};

struct TaskRange {
  int64_t begin, end;
};

// What is left of a thread's share of a call. A task is claimed by exchanging the word for its successor, which fails once
// another thread has claimed one. Whoever claims the first one of a call finds the word of an earlier call, and begins the new.
class alignas(64) Share {
 public:
  // A task of the call `seen`, or -1 if there is none. The owner takes them from the front, so that memory passes by in one
  // stream; who has nothing left of its own takes them from the end.
  int64_t claim(const Call& call, uint64_t seen, TaskRange whole, bool is_owner) {
    uint64_t word = word_.load(std::memory_order_acquire);
    for (;;) {
      const bool is_begun = call_of(word) == call_of(seen);
      // A call that is over had all its tasks claimed, so a late thread fails here or in the exchange.
      if (!is_begun && call.word.load(std::memory_order_acquire) != seen) return -1;
      const TaskRange left = is_begun ? TaskRange{int64_t(word >> kTaskBits) & kMaxTasks, int64_t(word) & kMaxTasks} : whole;
      if (left.begin >= left.end) return -1;
      const TaskRange rest{left.begin + is_owner, left.end - !is_owner};
      const uint64_t successor = numbered(call_of(seen), (uint64_t(rest.begin) << kTaskBits) | uint64_t(rest.end));
      if (word_.compare_exchange_weak(word, successor, std::memory_order_acq_rel, std::memory_order_acquire))
        return is_owner ? left.begin : rest.end;
    }
  }

 private:
  std::atomic<uint64_t> word_{0};
};

// What a thread has done: the last call in which it had tasks, and how many.
struct alignas(64) Done {
  std::atomic<uint64_t> word{0};
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
    call_.task = task;
    call_.context = context;
    const uint64_t word = numbered(call_of(call_.word.load(std::memory_order_relaxed)) + 1, uint64_t(count));
    call_.word.store(word, std::memory_order_release);
    if (sleepers_.load(std::memory_order_relaxed) > 0) wake();  // one that is just falling asleep misses this call, and no more
    wait_for(count - run_some(0, word), word);
  }

 private:
  // All shares are of one size, give or take a task.
  TaskRange share_of(int thread, int64_t count) const {
    const int64_t num = threads();
    return {(thread * count + num - 1) / num, ((thread + 1) * count + num - 1) / num};
  }

  // Runs tasks of the call `seen` until none is left, those of its own share first. Returns how many.
  int64_t run_some(int thread, uint64_t seen) {
    int64_t count = 0;
    for (int i = 0; i < threads(); ++i) {
      const int owner = (thread + i) % threads();
      const TaskRange whole = share_of(owner, count_of(seen));
      for (int64_t task; (task = shares_[owner].claim(call_, seen, whole, i == 0)) >= 0; ++count) call_.task(call_.context, task);
    }
    return count;
  }

  // Waits until the workers have done `count` tasks of the call.
  void wait_for(int64_t count, uint64_t call) const {
    for (int looks = 0;; ++looks) {
      int64_t done = 0;
      for (const Done& worker : done_) {
        const uint64_t word = worker.word.load(std::memory_order_acquire);
        if (call_of(word) == call_of(call)) done += count_of(word);
      }
      if (done == count) return;
      pause();
      if (looks > 4096) std::this_thread::yield();  // the last task is on a thread that the system has put aside
    }
  }

  // seen: the last call before this worker, which is over.
  void work(int thread, uint64_t seen) {
    using Clock = std::chrono::steady_clock;
    const auto is_new = [&] { return call_.word.load(std::memory_order_acquire) != seen; };
    Clock::time_point idle_since = Clock::now();
    while (!stopping_.load(std::memory_order_relaxed)) {
      for (int i = 0; i < kPausesPerLook && !is_new(); ++i) pause();
      if (is_new()) {
        seen = call_.word.load(std::memory_order_acquire);
        const int64_t count = run_some(thread, seen);
        if (count > 0) done_[thread].word.store(numbered(call_of(seen), uint64_t(count)), std::memory_order_release);
        idle_since = Clock::now();
      } else if (Clock::now() - idle_since > kSpin) {
        std::unique_lock lock(sleep_);
        sleepers_.fetch_add(1);
        awake_.wait(lock, [&] { return is_new() || stopping_.load(); });
        sleepers_.fetch_sub(1);
        idle_since = Clock::now();
      }
    }
  }

  void wake() {
    { std::lock_guard lock(sleep_); }
    awake_.notify_all();
  }

  void start_workers() {
    stopping_.store(false);
    shares_ = std::vector<Share>(threads());
    done_ = std::vector<Done>(threads());
    const uint64_t seen = call_.word.load(std::memory_order_relaxed);
    for (int i = 1; i < threads(); ++i) workers_.emplace_back([this, i, seen] { work(i, seen); });
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
  std::vector<Done> done_;
  std::atomic<int> threads_;
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::mutex sleep_;
  std::condition_variable awake_;
  Call call_;
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
