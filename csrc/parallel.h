// Threads and per-thread memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdlib>
#include <new>

#include "kernels.h"
#include "meetings.h"

namespace mono_quant {

inline int64_t thread_count() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return count > 0 ? count : 1;
}

// How many threads a piece of work is worth: a parallel region costs 5 to 13 us, so each thread needs a fair share.
inline int64_t worthwhile_threads(double microseconds) {
  if (microseconds < 20) return 1;
  return smaller(thread_count(), (int64_t)(microseconds / 10));
}

// Calls task(i) for i in [0, count) on torch's own threads; nested calls stay on their thread. Throws what a task threw.
template <class Task>
void run_tasks(int64_t count, const Task& task) {
  if (count <= 1) {
    if (count == 1) task(0);
    return;
  }
  struct Shared {
    const Task& task;
    Failure failure;  // torch would only say that there was one
  } shared{task, {}};
  auto range = [](int64_t begin, int64_t end, void* context) {
    Shared& shared = *static_cast<Shared*>(context);
    try {
      for (int64_t i = begin; i < end; ++i) shared.task(i);
    } catch (...) {
      shared.failure.note(std::current_exception());
    }
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, range, &shared));
  shared.failure.rethrow();
}

// Scratch memory of the calling thread, 64-byte aligned; kept for the next call unless it is large.
class ThreadScratch {
 public:
  explicit ThreadScratch(int64_t bytes) {
    Kept& kept = mine();
    const size_t need = (size_t)round_up(bytes < 64 ? 64 : bytes, 64);
    if (!kept.busy && need <= kKeep) {
      if (kept.bytes < need) {
        std::free(kept.memory);
        kept.memory = nullptr;
        kept.bytes = 0;
        kept.memory = allocate(need);
        kept.bytes = need;
      }
      kept.busy = true;
      memory_ = kept.memory;
    } else {
      memory_ = own_ = allocate(need);
    }
  }
  ~ThreadScratch() {
    if (own_) std::free(own_);
    else mine().busy = false;
  }
  ThreadScratch(const ThreadScratch&) = delete;
  void* get() const { return memory_; }

 private:
  static constexpr size_t kKeep = 4 << 20;
  struct Kept {
    void* memory = nullptr;
    size_t bytes = 0;
    bool busy = false;
    ~Kept() { std::free(memory); }
  };
  static Kept& mine() {
    thread_local Kept kept;
    return kept;
  }
  static void* allocate(size_t bytes) {
    void* p = std::aligned_alloc(64, bytes);
    if (!p) throw std::bad_alloc();
    return p;
  }
  void* memory_ = nullptr;
  void* own_ = nullptr;
};

}  // namespace mono_quant
