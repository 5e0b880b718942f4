// Memory for activations that outlives the call.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace mono_quant {

// Memory that one call leaves to the next: fresh pages cost more than many a step. One block waits for the whole process;
// calls that come while it is taken get their own. It is given back where the next call needs much less.
class KeptMemory {
 public:
  explicit KeptMemory(int64_t bytes) {
    block_ = slot().exchange(nullptr);
    if (block_ && (block_->bytes < bytes || block_->bytes > 4 * larger(bytes, 1 << 20))) drop();
    if (!block_) {
      const size_t size = (size_t)round_up(larger(bytes, 64), 64);
      char* memory = static_cast<char*>(std::aligned_alloc(64, size));
      if (!memory) throw std::bad_alloc();
      block_ = new Block{memory, (int64_t)size};
    }
  }
  ~KeptMemory() {
    Block* none = nullptr;
    if (block_ && !slot().compare_exchange_strong(none, block_)) drop();
  }
  KeptMemory(const KeptMemory&) = delete;
  char* memory() const { return block_->memory; }

 private:
  struct Block {
    char* memory;
    int64_t bytes;
  };
  static std::atomic<Block*>& slot() {
    static std::atomic<Block*> kept{nullptr};
    return kept;
  }
  void drop() {
    std::free(block_->memory);
    delete block_;
    block_ = nullptr;
  }
  Block* block_;
};

}  // namespace mono_quant
