// Threads that meet between the steps of a run, and what becomes of an error in one of them.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>

namespace mono_quant {

// The first of the errors that several threads meet.
class Failure {
 public:
  void note(std::exception_ptr error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!first_) first_ = std::move(error);
    any_.store(true, std::memory_order_release);
  }
  bool any() const { return any_.load(std::memory_order_acquire); }
  void rethrow() const {
    if (any()) std::rethrow_exception(first_);
  }

 private:
  std::atomic<bool> any_{false};
  std::mutex mutex_;
  std::exception_ptr first_;
};

// Threads that take pieces of one step after the other and wait for each other in between by spinning, which costs well
// under a microsecond where a parallel region costs 5 to 13.
class Meetings {
 public:
  explicit Meetings(int64_t count) : counters_(std::make_unique<Counter[]>((size_t)count)) {}

  // Runs task(i) for what is left of [0, pieces), and waits until all are done. Where a task threw, in whatever thread,
  // all threads that come to this meeting throw its error, and none goes on to the next.
  template <class Task>
  void share(int64_t meeting, int64_t pieces, const Task& task) {
    work(meeting, pieces, task);
    wait(meeting, pieces);
  }

  // The two halves of `share`, for those who have other work in between. The second must come before anything that relies
  // on the first; where a meeting in between throws, the run is over and nothing does.
  template <class Task>
  void work(int64_t meeting, int64_t pieces, const Task& task) {
    Counter& counter = counters_[(size_t)meeting];
    for (int64_t i; (i = counter.next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      try {
        if (!failure_.any()) task(i);
      } catch (...) {
        failure_.note(std::current_exception());
      }
      counter.done.fetch_add(1, std::memory_order_release);  // also where it threw, or the others would wait for ever
    }
  }

  void wait(int64_t meeting, int64_t pieces) const {
    const Counter& counter = counters_[(size_t)meeting];
    for (int64_t spins = 0; counter.done.load(std::memory_order_acquire) < pieces; ++spins) {
      if (spins > 4096) sched_yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
    failure_.rethrow();
  }

 private:
  struct alignas(128) Counter {
    std::atomic<int64_t> next{0}, done{0};
  };
  std::unique_ptr<Counter[]> counters_;
  Failure failure_;
};

}  // namespace mono_quant
