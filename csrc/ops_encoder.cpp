// encoder_layer: one layer of a transformer encoder in one call.
#include "encoder_run.h"
#include "layer_operands.h"

namespace mono_quant {
namespace {

constexpr int64_t kLinears = 6, kNormTensors = 4;

// Weight and bias.
EncoderNorm take_norm(std::vector<Tensor>& tensors, int64_t at, int64_t width, double eps, Floats* floats) {
  Tensor &weight = tensors[(size_t)at], &bias = tensors[(size_t)at + 1];
  const DType dtype = layer_type(weight, "the norm's weight");
  expect(weight, "the norm's weight", weight.dtype(), width);
  expect(bias, "the norm's bias", weight.dtype(), width);
  return {floats->of(weight.data<void>(), dtype, width), floats->of(bias.data<void>(), dtype, width), (float)eps};
}

// ---- encoder_layer(Tensor x, Tensor? mask, Tensor[] weights, int heads, float scale, float attention_eps,
// ----               float output_eps, str activation) -> Tensor

void encoder_layer(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]), mask = take_optional_tensor(stack[1]);
  std::vector<Tensor> weights = take_tensors(stack[2]);
  const int64_t heads = take_int(stack[3]);
  const double scale = take_float(stack[4]), attention_eps = take_float(stack[5]), output_eps = take_float(stack[6]);
  const Activation activation = activation_from(take_string(stack[7]));
  check(x.dim() == 3, "encoder_layer takes [samples, length, width]");
  const DType dtype = layer_type(x, "the input of encoder_layer");
  check((int64_t)weights.size() == kLinears * kTensorsEach + kNormTensors, "encoder_layer got another number of weights");
  x.make_contiguous();
  EncoderArgs a = {};
  a.samples = x.size(0);
  a.length = x.size(1);
  a.width = x.size(2);
  a.heads = heads;
  check(heads > 0 && a.width > 0 && a.width % heads == 0, "the width is not a multiple of the number of heads");
  a.scale = (float)scale;
  Floats floats;
  PackedLayer* const layers[] = {&a.query, &a.key, &a.value, &a.output, &a.up, &a.down};
  for (int64_t i = 0; i < kLinears; ++i) {
    const int64_t inputs = i == 5 ? a.up.outputs : a.width;
    *layers[i] = take_layer(weights, i * kTensorsEach, inputs, i == 4 ? activation : kNone, &floats);
    check(i == 4 || layers[i]->outputs == a.width, "a layer of the encoder has another width");
    check(inputs <= kDeepestLayer, "a layer of the encoder is too deep for one call");
  }
  const int64_t first = kLinears * kTensorsEach;
  a.attention_norm = take_norm(weights, first, a.width, attention_eps, &floats);
  a.output_norm = take_norm(weights, first + 2, a.width, output_eps, &floats);
  std::vector<float> mask_values;
  if (mask) {
    mask_values = additive_mask(mask, a.samples, a.length, a.length, a.length, &a.mask_rows);
    a.mask = mask_values.data();
  }
  Tensor out = Tensor::empty({a.samples, a.length, a.width}, x.dtype());
  if (out.numel() > 0) {
    a.dtype = dtype;
    a.x = x.data<void>();
    a.out = out.mutable_data<void>();
    EncoderRun(a).run();
  }
  stack[0] = out.release();
}

}  // namespace
}  // namespace mono_quant

STABLE_TORCH_LIBRARY_IMPL(mono_quant, CPU, m) { m.impl("encoder_layer", &mono_quant::encoder_layer); }
