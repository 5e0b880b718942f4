// encoder_layer: one layer of a transformer encoder in one call.
#include "encoder_run.h"
#include "operands.h"

namespace mono_quant {
namespace {

constexpr int64_t kLinears = 6, kTensorsEach = 5, kNormTensors = 4;

// Tiles, column sums, scales, bias and zero points (empty without).
EncoderLinear take_linear(std::vector<Tensor>& tensors, int64_t number, int64_t inputs, Activation activation) {
  Tensor* t = &tensors[(size_t)(number * kTensorsEach)];
  const int64_t n = t[2].numel();
  expect(t[2], "weight_scale", aoti_torch_dtype_float32(), n);
  check(t[0].dim() == 5 && t[0].size(0) == (n + 15) / 16 && t[0].size(1) == (inputs + 63) / 64,
        "the packed weight does not fit the layer's sizes");
  expect(t[0], "the packed weight", aoti_torch_dtype_int8(), t[0].size(0) * t[0].size(1) * 1024);
  expect(t[1], "column_sum", aoti_torch_dtype_int32(), n);
  expect(t[3], "bias", aoti_torch_dtype_float32(), n);
  const bool asymmetric = t[4].numel() > 0;
  expect(t[4], "weight_zero_point", aoti_torch_dtype_int8(), asymmetric ? n : 0);
  return {t[0].data<int8_t>(), t[1].data<int32_t>(), t[2].data<float>(),
          asymmetric ? t[4].data<int8_t>() : nullptr, t[3].data<float>(), inputs, n, activation};
}

EncoderNorm take_norm(std::vector<Tensor>& tensors, int64_t at, int64_t width, double eps) {
  expect(tensors[(size_t)at], "the norm's weight", aoti_torch_dtype_float32(), width);
  expect(tensors[(size_t)at + 1], "the norm's bias", aoti_torch_dtype_float32(), width);
  return {tensors[(size_t)at].data<float>(), tensors[(size_t)at + 1].data<float>(), (float)eps};
}

// A mask [samples or 1, 1, length or 1, length] of bool or float32 as floats to add, rows padded for whole vectors.
std::vector<float> additive_mask(const Tensor& mask, int64_t samples, int64_t length, int64_t* rows) {
  const bool fits = mask.dim() == 4 && (mask.size(0) == samples || mask.size(0) == 1) && mask.size(1) == 1 &&
                    (mask.size(2) == length || mask.size(2) == 1) && mask.size(3) == length;
  check(fits, "the mask must be [samples, 1, queries, keys]");
  const bool boolean = mask.dtype() == aoti_torch_dtype_bool();
  check(boolean || mask.dtype() == aoti_torch_dtype_float32(), "the mask must be bool or float32");
  *rows = mask.size(2) == 1 || mask.stride(2) == 0 ? 1 : length;
  const int64_t columns = round_up(length, kMaskColumns), step = mask.size(0) == 1 ? 0 : mask.stride(0);
  std::vector<float> values((size_t)(samples * *rows * columns));
  for (int64_t s = 0; s < samples; ++s) {
    for (int64_t r = 0; r < *rows; ++r) {
      float* to = values.data() + (s * *rows + r) * columns;
      const int64_t from = s * step + (*rows == 1 ? 0 : r * mask.stride(2));
      if (boolean) {
        const bool* seen = mask.data<bool>() + from;
        for (int64_t i = 0; i < length; ++i) to[i] = seen[i * mask.stride(3)] ? 0.f : -__builtin_inff();
      } else {
        const float* add = mask.data<float>() + from;
        for (int64_t i = 0; i < length; ++i) to[i] = add[i * mask.stride(3)];
      }
    }
  }
  return values;
}

// ---- encoder_layer(Tensor x, Tensor? mask, Tensor[] weights, int heads, float scale, float attention_eps,
// ----               float output_eps, str activation) -> Tensor

void encoder_layer(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]), mask = take_optional_tensor(stack[1]);
  std::vector<Tensor> weights = take_tensors(stack[2]);
  const int64_t heads = take_int(stack[3]);
  const double scale = take_float(stack[4]), attention_eps = take_float(stack[5]), output_eps = take_float(stack[6]);
  const Activation activation = activation_from(take_string(stack[7]));
  check(x.dim() == 3 && x.dtype() == aoti_torch_dtype_float32(), "encoder_layer takes float32 [samples, length, width]");
  check((int64_t)weights.size() == kLinears * kTensorsEach + kNormTensors, "encoder_layer got another number of weights");
  x.make_contiguous();
  EncoderArgs a = {};
  a.samples = x.size(0);
  a.length = x.size(1);
  a.width = x.size(2);
  a.heads = heads;
  check(heads > 0 && a.width > 0 && a.width % heads == 0, "the width is not a multiple of the number of heads");
  a.scale = (float)scale;
  EncoderLinear* const layers[] = {&a.query, &a.key, &a.value, &a.output, &a.up, &a.down};
  for (int64_t i = 0; i < kLinears; ++i) {
    const int64_t inputs = i == 5 ? a.up.outputs : a.width;
    *layers[i] = take_linear(weights, i, inputs, i == 4 ? activation : kNone);
    check(i == 4 || layers[i]->outputs == a.width, "a layer of the encoder has another width");
    check(inputs <= 32768, "a layer of the encoder is too deep for one call");
  }
  a.attention_norm = take_norm(weights, kLinears * kTensorsEach, a.width, attention_eps);
  a.output_norm = take_norm(weights, kLinears * kTensorsEach + 2, a.width, output_eps);
  std::vector<float> mask_values;
  if (mask) {
    mask_values = additive_mask(mask, a.samples, a.length, &a.mask_rows);
    a.mask = mask_values.data();
  }
  Tensor out = Tensor::empty({a.samples, a.length, a.width}, aoti_torch_dtype_float32());
  if (out.numel() > 0) {
    a.x = x.data<float>();
    a.out = out.mutable_data<float>();
    EncoderRun(a).run();
  }
  stack[0] = out.release();
}

}  // namespace
}  // namespace mono_quant

STABLE_TORCH_LIBRARY_IMPL(mono_quant, CPU, m) { m.impl("encoder_layer", &mono_quant::encoder_layer); }
