// Operands of the operators that run layers of encoders.
#pragma once

#include "encoder_run.h"
#include "layer_operands.h"

namespace mono_quant {

constexpr int64_t kEncoderLinears = 6, kEncoderNorms = 2;
constexpr int64_t kEncoderTensors = kEncoderLinears * kTensorsEach + 2 * kEncoderNorms;

// Weight and bias of a norm, as they are now: both float32, or both bfloat16.
inline void take_norm(const Tensor* t, int64_t width, Floats* floats, EncoderNorm* norm) {
  const int32_t kind = t[0].dtype_now();
  const DType dtype = float_type(kind, "the norm's weight");
  const void *weight = t[0].data_now(kind, width), *bias = t[1].data_now(kind, width);
  if (!weight || !bias || dtype == kFloat16) fail("a norm does not fit the layers, or has been given data of another kind");
  norm->weight = floats->of(weight, dtype, width);
  norm->bias = floats->of(bias, dtype, width);
}

// Weight and bias of the norm after attention and of the norm after the feed-forward pair.
inline void take_norms(const Tensor* norms, int64_t width, Floats* floats, EncoderLayer* layer) {
  take_norm(norms, width, floats, &layer->attention_norm);
  take_norm(norms + 2, width, floats, &layer->output_norm);
}

// The kEncoderTensors of a layer, from `at` on, but for its norms.
inline void take_weights(std::vector<Tensor>& weights, int64_t at, int64_t width, Activation activation, Floats* floats,
                         EncoderLayer* layer) {
  const std::array<PackedLayer*, kEncoderLinears> layers = layer->linears();
  for (int64_t i = 0; i < kEncoderLinears; ++i) {
    const int64_t inputs = i == 5 ? layer->up.outputs : width;
    *layers[i] = take_layer(weights, at + i * kTensorsEach, inputs, i == 4 ? activation : kNone, floats);
    check(i == 4 || layers[i]->outputs == width, "a layer of the encoder has another width");
    check(inputs <= kDeepestLayer, "a layer of the encoder is too deep for one call");
  }
}

inline void check_heads(int64_t width, int64_t heads) {
  check(heads > 0 && width > 0 && width % heads == 0, "the width is not a multiple of the number of heads");
}

// Runs the layers on x [samples, length, width]; the output is of its dtype.
inline Tensor run_encoder(Tensor& x, const Tensor& mask, int64_t heads, float scale,
                          const std::vector<EncoderLayer>& layers) {
  EncoderArgs a = {};
  a.dtype = layer_type(x, "the input of encoder layers");
  a.samples = x.size(0);
  a.length = x.size(1);
  a.width = x.size(2);
  a.heads = heads;
  a.scale = scale;
  std::vector<float> mask_values;
  if (mask) {
    mask_values = additive_mask(mask, a.samples, a.length, a.length, a.length, &a.mask_rows);
    a.mask = mask_values.data();
  }
  Tensor out = Tensor::empty({a.samples, a.length, a.width}, x.dtype());
  if (out.numel() > 0) {
    x.make_contiguous();
    a.x = x.data<void>();
    a.out = out.mutable_data<void>();
    EncoderRun(a, layers).run();
  }
  return out;
}

}  // namespace mono_quant
