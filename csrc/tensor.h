// Tensors over the C functions of the stable ABI: one owned handle, no shared_ptr, no dispatcher call on the hot path.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace mono_quant {

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error("mono_quant: " + message); }

inline void check(bool condition, const char* message) {
  if (!condition) fail(message);
}

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &dim_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle_, &sizes_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &dtype_));
  }
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(dim_, other.dim_);
    std::swap(sizes_, other.sizes_);
    std::swap(strides_, other.strides_);
    std::swap(dtype_, other.dtype_);
    return *this;
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  static Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
    std::vector<int64_t> strides(sizes.size());
    int64_t step = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
      strides[i] = step;
      step *= sizes[i] > 0 ? sizes[i] : 1;
    }
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides.data(), dtype,
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i < 0 ? i + dim_ : i]; }
  int64_t stride(int64_t i) const { return strides_[i < 0 ? i + dim_ : i]; }
  int32_t dtype() const { return dtype_; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim_; ++i) n *= sizes_[i];
    return n;
  }
  std::vector<int64_t> sizes() const { return std::vector<int64_t>(sizes_, sizes_ + dim_); }

  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t i = dim_; i-- > 0;) {
      if (sizes_[i] != 1 && strides_[i] != step) return numel() == 0;
      step *= sizes_[i];
    }
    return true;
  }

  template <typename T>
  const T* data() const {
    const void* p = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &p));
    return static_cast<const T*>(p);
  }
  template <typename T>
  T* mutable_data() const {
    void* p = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &p));
    return static_cast<T*>(p);
  }

  // The elements as they are now, for a tensor that is held from call to call: it may have been given other data since.
  // Null where these are no longer `numel` of `dtype` in a row on the CPU.
  const void* data_now(int32_t dtype, int64_t numel) const {
    int32_t device = 0;
    int64_t numel_now = 0;
    bool contiguous = false;
    const void* p = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle_, &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle_, &numel_now));
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_, &contiguous));
    const bool same = device == aoti_torch_device_type_cpu() && dtype_now() == dtype && numel_now == numel && contiguous;
    if (same) TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &p));
    return p;
  }
  int32_t dtype_now() const {
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &dtype));
    return dtype;
  }

  // This tensor, or a contiguous copy in its place.
  void make_contiguous() {
    if (is_contiguous()) return;
    AtenTensorHandle same, owned;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &same));
    const torch::stable::Tensor copy = torch::stable::contiguous(torch::stable::Tensor(same));
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(copy.get(), &owned));
    *this = Tensor(owned);
  }

  StableIValue release() {
    AtenTensorHandle handle = handle_;
    handle_ = nullptr;
    return torch::stable::detail::from(handle);
  }

 private:
  AtenTensorHandle handle_ = nullptr;
  int64_t dim_ = 0;
  int64_t* sizes_ = nullptr;
  int64_t* strides_ = nullptr;
  int32_t dtype_ = 0;
};

inline Tensor take_tensor(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }

inline Tensor take_optional_tensor(StableIValue value) {
  StableIValue* inner = torch::stable::detail::to<StableIValue*>(value);
  if (!inner) return Tensor();
  const StableIValue held = *inner;
  delete inner;  // as the header's own conversion does for this target version
  return take_tensor(held);
}

inline StableIValue release_tensors(std::vector<Tensor>& tensors) {
  StableListHandle list;
  TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(tensors.size(), &list));
  for (Tensor& tensor : tensors) TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, tensor.release()));
  return torch::stable::detail::from(list);
}

inline int64_t take_int(StableIValue value) { return torch::stable::detail::to<int64_t>(value); }

inline bool take_bool(StableIValue value) { return torch::stable::detail::to<bool>(value); }

inline double take_float(StableIValue value) { return torch::stable::detail::to<double>(value); }

template <typename Item>
std::vector<Item> take_list(StableIValue value, Item (*take)(StableIValue)) {
  const StableListHandle list = torch::stable::detail::to<StableListHandle>(value);
  size_t count = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &count));
  std::vector<Item> items;
  for (size_t i = 0; i < count; ++i) {
    StableIValue item;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
    items.push_back(take(item));
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  return items;
}

inline std::vector<Tensor> take_tensors(StableIValue value) { return take_list(value, take_tensor); }

inline std::vector<double> take_floats(StableIValue value) { return take_list(value, take_float); }

// By hand: the header's conversion to std::string leaks one string per call.
inline std::string take_string(StableIValue value) {
  StringHandle handle = torch::stable::detail::to<StringHandle>(value);
  const char* text = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  std::string result(text, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return result;
}

inline DType float_type(int32_t dtype, const char* what) {
  static const int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       f16 = aoti_torch_dtype_float16();
  if (dtype == f32) return kFloat32;
  if (dtype == bf16) return kBFloat16;
  if (dtype == f16) return kFloat16;
  fail(std::string(what) + " must be float32, bfloat16 or float16");
}

}  // namespace mono_quant
