// Layers that are handed over once, and that calls name by a number from then on.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define MONO_QUANT_CAN_FORK 1
#endif

#include "layer_operands.h"

namespace mono_quant {

// All that is held of one kind, whose name errors give.
template <class Held>
class HeldLayers {
 public:
  static HeldLayers& all() {
    static HeldLayers* const held = create();  // never destroyed: threads may outlive static objects
    return *held;
  }
  int64_t add(std::shared_ptr<const Held> layers) {
    const std::lock_guard<std::mutex> lock(mutex_);
    held_[next_] = std::move(layers);
    return next_++;
  }
  std::shared_ptr<const Held> get(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = held_.find(number);
    if (found == held_.end()) {
      fail("there are no " + std::string(Held::kKind) + " layers of number " + std::to_string(number));
    }
    return found->second;
  }
  void drop(int64_t number) {
    std::shared_ptr<const Held> last;  // destroyed after the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = held_.find(number);
    if (found == held_.end()) return;
    last = std::move(found->second);
    held_.erase(found);
  }

 private:
  static HeldLayers* create() {
#if MONO_QUANT_CAN_FORK
    // Another thread may hold the lock when the process forks; in the child nobody would release it.
    pthread_atfork([] { all().mutex_.lock(); }, [] { all().mutex_.unlock(); }, [] { all().mutex_.unlock(); });
#endif
    return new HeldLayers;
  }

  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Held>> held_;
  int64_t next_ = 0;
};

template <typename T>
const T* elements_now(const Tensor& held, int32_t dtype, int64_t numel) {
  const void* data = held.data_now(dtype, numel);
  if (!data) fail("a tensor of held layers has been given data of another kind");
  return static_cast<const T*>(data);
}

// Where the tensors of a linear layer lie now: their data may have been exchanged or moved, into shared memory say.
inline void look_again(const Tensor* t, Floats* floats, PackedLayer* layer) {
  const int64_t n = layer->outputs, scales = n * layer->groups();
  if (layer->packed) {
    layer->packed = elements_now<int8_t>(t[0], aoti_torch_dtype_int8(), tile_bytes(layer->inputs, n));
    layer->column_sum = elements_now<int32_t>(t[1], aoti_torch_dtype_int32(), n);
  } else {
    layer->words = elements_now<void>(t[0], aoti_torch_dtype_int32(), n * layer->row_bytes / 4);
  }
  layer->weight_scale = elements_now<float>(t[2], aoti_torch_dtype_float32(), scales);
  const int32_t bias = t[3].dtype_now();
  layer->bias = floats->of(elements_now<void>(t[3], bias, n), float_type(bias, "the bias of a held layer"), n);
  if (layer->weight_zero_point) {
    layer->weight_zero_point = elements_now<int8_t>(t[4], aoti_torch_dtype_int8(), scales);
  }
}

}  // namespace mono_quant
