// hold_encoder_layers, encoder_layers: all layers of an encoder in one call.
//
// Its weights are handed over once, as those of a decoder are; for a short sentence it would take as long as the layers.
#include "encoder_operands.h"
#include "held_layers.h"

namespace mono_quant {
namespace {

struct HeldEncoder {
  static constexpr const char* kKind = "encoder";
  int64_t width = 0, heads = 0;
  float scale = 0;
  std::vector<Tensor> weights;
  std::vector<EncoderLayer> layers;
};

std::vector<EncoderLayer> current_layers(const HeldEncoder& held, Floats* floats) {
  std::vector<EncoderLayer> layers = held.layers;
  const Tensor* t = held.weights.data();
  for (EncoderLayer& layer : layers) {
    for (PackedLayer* linear : layer.linears()) {
      look_again(t, floats, linear);
      t += kTensorsEach;
    }
    take_norms(t, held.width, floats, &layer);
    t += 2 * kEncoderNorms;
  }
  return layers;
}

// ---- hold_encoder_layers(Tensor[] weights, int heads, float scale, float[] eps, str activation) -> int

void hold_encoder_layers(StableIValue* stack, uint64_t, uint64_t) {
  auto held = std::make_shared<HeldEncoder>();
  held->weights = take_tensors(stack[0]);
  held->heads = take_int(stack[1]);
  held->scale = (float)take_float(stack[2]);
  const std::vector<double> eps = take_floats(stack[3]);
  const Activation activation = activation_from(take_string(stack[4]));
  const int64_t count = (int64_t)held->weights.size() / kEncoderTensors;
  const bool fits = count > 0 && (int64_t)held->weights.size() == count * kEncoderTensors &&
                    (int64_t)eps.size() == count * kEncoderNorms;
  check(fits, "encoder layers got another number of weights");
  for (const Tensor& t : held->weights) check(t.is_contiguous(), "the weights of encoder layers must be contiguous");
  held->width = held->weights.back().numel();
  check_heads(held->width, held->heads);
  held->layers.resize((size_t)count);
  for (int64_t i = 0; i < count; ++i) {
    EncoderLayer& layer = held->layers[(size_t)i];
    Floats floats;  // as a call will have them; here it is tried
    take_weights(held->weights, i * kEncoderTensors, held->width, activation, &floats, &layer);
    take_norms(&held->weights[(size_t)(i * kEncoderTensors + kEncoderLinears * kTensorsEach)], held->width, &floats,
               &layer);
    layer.attention_norm.eps = (float)eps[(size_t)(i * kEncoderNorms)];
    layer.output_norm.eps = (float)eps[(size_t)(i * kEncoderNorms + 1)];
  }
  stack[0] = torch::stable::detail::from(HeldLayers<HeldEncoder>::all().add(std::move(held)));
}

// ---- encoder_layers(int held, Tensor x, Tensor? mask) -> Tensor

void encoder_layers(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[1]), mask = take_optional_tensor(stack[2]);
  const std::shared_ptr<const HeldEncoder> held = HeldLayers<HeldEncoder>::all().get(take_int(stack[0]));
  check(x.dim() == 3 && x.size(2) == held->width, "encoder layers take [samples, length, width]");
  Floats floats;
  const std::vector<EncoderLayer> layers = current_layers(*held, &floats);
  stack[0] = run_encoder(x, mask, held->heads, held->scale, layers).release();
}

}  // namespace
}  // namespace mono_quant

void mono_quant_release_encoder_layers(int64_t number) {
  mono_quant::HeldLayers<mono_quant::HeldEncoder>::all().drop(number);
}

STABLE_TORCH_LIBRARY_IMPL(mono_quant, CPU, m) {
  m.impl("hold_encoder_layers", &mono_quant::hold_encoder_layers);
  m.impl("encoder_layers", &mono_quant::encoder_layers);
}
