// encoder_layer: one layer of a transformer encoder in one call.
#include "encoder_operands.h"

namespace mono_quant {
namespace {

// ---- encoder_layer(Tensor x, Tensor? mask, Tensor[] weights, int heads, float scale, float attention_eps,
// ----               float output_eps, str activation) -> Tensor

void encoder_layer(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]), mask = take_optional_tensor(stack[1]);
  std::vector<Tensor> weights = take_tensors(stack[2]);
  const int64_t heads = take_int(stack[3]);
  const float scale = (float)take_float(stack[4]);
  std::vector<EncoderLayer> layers(1);
  layers[0].attention_norm.eps = (float)take_float(stack[5]);
  layers[0].output_norm.eps = (float)take_float(stack[6]);
  const Activation activation = activation_from(take_string(stack[7]));
  check(x.dim() == 3, "encoder layers take [samples, length, width]");
  check((int64_t)weights.size() == kEncoderTensors, "encoder_layer got another number of weights");
  const int64_t width = x.size(2);
  check_heads(width, heads);
  Floats floats;
  take_weights(weights, 0, width, activation, &floats, &layers[0]);
  Tensor* const norms = &weights[kEncoderLinears * kTensorsEach];
  for (int64_t n = 0; n < 2 * kEncoderNorms; ++n) norms[n].make_contiguous();
  take_norms(norms, width, &floats, &layers[0]);
  stack[0] = run_encoder(x, mask, heads, scale, layers).release();
}

}  // namespace
}  // namespace mono_quant

STABLE_TORCH_LIBRARY_IMPL(mono_quant, CPU, m) { m.impl("encoder_layer", &mono_quant::encoder_layer); }
