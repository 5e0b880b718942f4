// Operands of the operators that run whole layers of transformers.
#pragma once

#include <memory>
#include <vector>

#include "operands.h"
#include "packed_layer.h"

namespace mono_quant {

// Tensors of each linear layer among an operator's weights.
constexpr int64_t kTensorsEach = 5;
// Sums of products of 8-bit codes fit 32 bits up to this many inputs.
constexpr int64_t kDeepestLayer = 32768;

// Values as float32, kept for a call where they are of another type.
class Floats {
 public:
  const float* of(const void* data, DType dtype, int64_t count) {
    if (dtype == kFloat32 || count == 0) return static_cast<const float*>(data);
    kept_.emplace_back(new float[(size_t)count]);
    kernels().widen(data, dtype, kept_.back().get(), count);
    return kept_.back().get();
  }

 private:
  std::vector<std::unique_ptr<float[]>> kept_;
};

inline int64_t tile_bytes(int64_t inputs, int64_t outputs) {
  return round_up(outputs, 16) * round_up(inputs, kPanelDepth);
}

// What scales, bias and zero points (empty without) tell of a layer; they are the third and the following tensors.
inline PackedLayer layer_of(Tensor* t, int64_t inputs, int64_t outputs, Activation activation, Floats* floats) {
  check(inputs > 0 && outputs > 0, "a layer has no inputs or no outputs");
  expect(t[3], "bias", t[3].dtype(), outputs);
  PackedLayer layer = {};
  layer.weight_scale = t[2].data<float>();
  layer.bias = floats->of(t[3].data<void>(), float_type(t[3].dtype(), "bias"), outputs);
  layer.weight_zero_point = t[4].numel() > 0 ? t[4].data<int8_t>() : nullptr;
  layer.inputs = inputs;
  layer.outputs = outputs;
  layer.activation = activation;
  return layer;
}

// Tiles, column sums, scales, bias and zero points (empty without), from `at` on.
inline PackedLayer take_layer(std::vector<Tensor>& tensors, int64_t at, int64_t inputs, Activation activation,
                              Floats* floats) {
  Tensor* t = &tensors[(size_t)at];
  const int64_t n = t[2].numel();
  expect(t[2], "weight_scale", aoti_torch_dtype_float32(), n);
  check(t[0].dim() == 5 && t[0].size(0) == (n + 15) / 16 && t[0].size(1) == (inputs + 63) / 64,
        "the packed weight does not fit the layer's sizes");
  expect(t[0], "the packed weight", aoti_torch_dtype_int8(), tile_bytes(inputs, n));
  expect(t[1], "column_sum", aoti_torch_dtype_int32(), n);
  expect(t[4], "weight_zero_point", aoti_torch_dtype_int8(), t[4].numel() > 0 ? n : 0);
  PackedLayer layer = layer_of(t, inputs, n, activation, floats);
  layer.packed = t[0].data<int8_t>();
  layer.column_sum = t[1].data<int32_t>();
  return layer;
}

// Words of few-bit values, their bits (one number), scales [outputs, groups], bias and zero points (empty without).
inline PackedLayer take_words(std::vector<Tensor>& tensors, int64_t at, int64_t inputs, Activation activation,
                              Floats* floats) {
  Tensor* t = &tensors[(size_t)at];
  expect(t[1], "the number of bits", aoti_torch_dtype_int32(), 1);
  const int bits = *t[1].data<int32_t>();
  check(bits == 4 || bits == 8, "weight-only weights have 4 or 8 bits");
  check(t[0].dim() == 2 && t[2].dim() == 2, "packed weights and their scales must be matrices");
  const int64_t n = t[0].size(0), groups = t[2].size(1), words = (inputs * bits + 31) / 32;
  check(groups > 0 && inputs % groups == 0, "the groups of a weight do not divide its inputs");
  expect(t[0], "weight_packed", aoti_torch_dtype_int32(), n * words);
  expect(t[2], "weight_scale", aoti_torch_dtype_float32(), n * groups);
  expect(t[4], "weight_zero_point", aoti_torch_dtype_int8(), t[4].numel() > 0 ? n * groups : 0);
  PackedLayer layer = layer_of(t, inputs, n, activation, floats);
  layer.words = t[0].data<void>();
  layer.bits = bits;
  layer.row_bytes = words * 4;
  layer.group_size = inputs / groups;
  return layer;
}

// What whole layers compute with: float32, or bfloat16 that is widened to it and rounded from it.
inline DType layer_type(const Tensor& t, const char* what) {
  const DType dtype = float_type(t.dtype(), what);
  if (dtype == kFloat16) fail(std::string(what) + " must be float32 or bfloat16");
  return dtype;
}

// The elements of a mask as what they add to scores.
class MaskElements {
 public:
  explicit MaskElements(const Tensor& mask) {
    if (mask.dtype() == aoti_torch_dtype_bool()) shown_ = mask.data<bool>();
    else if (layer_type(mask, "a mask that is not bool") == kFloat32) added_ = mask.data<float>();
    else halves_ = mask.data<torch::headeronly::BFloat16>();
  }
  float at(int64_t i) const {
    if (shown_) return shown_[i] ? 0.f : -__builtin_inff();
    return added_ ? added_[i] : (float)halves_[i];
  }

 private:
  const bool* shown_ = nullptr;  // true is seen
  const float* added_ = nullptr;
  const torch::headeronly::BFloat16* halves_ = nullptr;
};

// A mask [samples or 1, 1, queries or 1, all keys] as floats to add: the first `keys` of each row, padded for whole
// vectors.
inline std::vector<float> additive_mask(const Tensor& mask, int64_t samples, int64_t queries, int64_t all_keys,
                                        int64_t keys, int64_t* rows) {
  const bool fits = mask.dim() == 4 && (mask.size(0) == samples || mask.size(0) == 1) && mask.size(1) == 1 &&
                    (mask.size(2) == queries || mask.size(2) == 1) && mask.size(3) == all_keys;
  check(fits, "the mask must be [samples, 1, queries, keys]");
  const MaskElements elements(mask);
  *rows = mask.size(2) == 1 || mask.stride(2) == 0 ? 1 : queries;
  const int64_t columns = round_up(keys, kMaskColumns), step = mask.size(0) == 1 ? 0 : mask.stride(0);
  std::vector<float> values((size_t)(samples * *rows * columns));
  for (int64_t s = 0; s < samples; ++s) {
    for (int64_t r = 0; r < *rows; ++r) {
      float* to = values.data() + (s * *rows + r) * columns;
      const int64_t from = s * step + (*rows == 1 ? 0 : r * mask.stride(2));
      for (int64_t i = 0; i < keys; ++i) to[i] = elements.at(from + i * mask.stride(3));
    }
  }
  return values;
}

}  // namespace mono_quant
