// hold_decoder_layers, decoder_layers, decoder_layers_static_cache: all layers of a decoder in one call.
//
// A decoder of thirty layers has a thousand tensors, and to hand them over for each token would take longer than many a
// layer. So they are handed over once, and calls name them by a number.
#include "decoder_operands.h"
#include "held_layers.h"

namespace mono_quant {
namespace {

struct HeldDecoder {
  static constexpr const char* kKind = "decoder";
  DecoderShape shape = {};
  float scale = 0;
  std::vector<Tensor> weights;
  std::vector<DecoderLayer> layers;
};

std::vector<DecoderLayer> current_layers(const HeldDecoder& held, Floats* floats) {
  std::vector<DecoderLayer> layers = held.layers;
  const Tensor* t = held.weights.data();
  for (size_t i = 0; i < layers.size(); ++i) {
    DecoderLayer& layer = layers[i];
    for (PackedLayer* linear : layer.linears()) {
      look_again(t, floats, linear);
      t += kTensorsEach;
    }
    take_norms(t, held.shape, floats, &layer);
    t += kDecoderNorms;
  }
  return layers;
}

// ---- hold_decoder_layers(Tensor[] weights, int heads, int key_heads, int depth, float scale, float[] eps,
// ----                     str activation) -> int

void hold_decoder_layers(StableIValue* stack, uint64_t, uint64_t) {
  auto held = std::make_shared<HeldDecoder>();
  held->weights = take_tensors(stack[0]);
  held->shape.heads = take_int(stack[1]);
  held->shape.key_heads = take_int(stack[2]);
  held->shape.depth = take_int(stack[3]);
  held->scale = (float)take_float(stack[4]);
  const std::vector<double> eps = take_floats(stack[5]);
  held->shape.activation = activation_from(take_string(stack[6]));
  const int64_t count = (int64_t)held->weights.size() / kDecoderTensors;
  const bool fits = count > 0 && (int64_t)held->weights.size() == count * kDecoderTensors &&
                    (int64_t)eps.size() == count * kDecoderNorms;
  check(fits, "decoder layers got another number of weights");
  for (const Tensor& t : held->weights) check(t.is_contiguous(), "the weights of decoder layers must be contiguous");
  held->shape.dtype = layer_type(held->weights.back(), "the norm's weight");
  held->shape.width = held->weights.back().numel();
  check_heads(held->shape);
  held->layers.resize((size_t)count);
  for (int64_t i = 0; i < count; ++i) {
    DecoderLayer& layer = held->layers[(size_t)i];
    Floats floats;  // as a call will have them; here it is tried
    take_weights(held->weights, i * kDecoderTensors, held->shape, &floats, &layer);
    take_norms(&held->weights[(size_t)((i + 1) * kDecoderTensors - kDecoderNorms)], held->shape, &floats, &layer);
    layer.attention_eps = (float)eps[(size_t)(i * kDecoderNorms)];
    layer.output_eps = (float)eps[(size_t)(i * kDecoderNorms + 1)];
  }
  stack[0] = torch::stable::detail::from(HeldLayers<HeldDecoder>::all().add(std::move(held)));
}

// What the operators take, kept for the call.
struct Call {
  std::shared_ptr<const HeldDecoder> held;
  Tensor x, cosine, sine, mask;
  std::vector<Tensor> keys, values;
  Floats floats;
  DecoderArgs a = {};
  std::vector<DecoderLayer> layers;
};

// Both begin with the number, x, keys and values; from `rest` on, they go on with cosine, sine, mask and causal.
void take_operands(StableIValue* stack, StableIValue* rest, Call* c) {
  c->x = take_tensor(stack[1]);
  c->keys = take_tensors(stack[2]);
  c->values = take_tensors(stack[3]);
  c->cosine = take_tensor(rest[0]);
  c->sine = take_tensor(rest[1]);
  c->mask = take_optional_tensor(rest[2]);
  c->a.causal = take_bool(rest[3]);
  c->held = HeldLayers<HeldDecoder>::all().get(take_int(stack[0]));
  c->a.scale = c->held->scale;
  c->layers = current_layers(*c->held, &c->floats);
  check(c->keys.size() == c->layers.size() && c->values.size() == c->layers.size(),
        "there must be keys and values for each layer");
  take_inputs(c->x, c->cosine, c->sine, c->held->shape, &c->floats, &c->a);
}

// ---- decoder_layers(int held, Tensor x, Tensor[] past_keys, Tensor[] past_values, Tensor cosine, Tensor sine,
// ----                Tensor? mask, bool causal) -> (Tensor, Tensor[], Tensor[])

void decoder_layers(StableIValue* stack, uint64_t, uint64_t) {
  Call c;
  take_operands(stack, stack + 4, &c);
  std::vector<Tensor> keys(c.layers.size()), values(c.layers.size());
  for (size_t i = 0; i < c.layers.size(); ++i) {
    take_growing_cache(c.keys[i], c.values[i], c.a, &c.layers[i], &keys[i], &values[i]);
    check(c.layers[i].seen == c.layers[0].seen, "the layers have pasts of different lengths");
  }
  stack[0] = run_decoder(&c.a, c.layers, c.x, c.mask, c.layers[0].seen).release();
  stack[1] = release_tensors(keys);
  stack[2] = release_tensors(values);
}

// ---- decoder_layers_static_cache(int held, Tensor x, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor[] positions,
// ----                             Tensor cosine, Tensor sine, Tensor? mask, bool causal) -> Tensor

void decoder_layers_static_cache(StableIValue* stack, uint64_t, uint64_t) {
  Call c;
  const std::vector<Tensor> positions = take_tensors(stack[4]);
  take_operands(stack, stack + 5, &c);
  check(positions.size() == c.layers.size(), "there must be a position for each layer");
  for (size_t i = 0; i < c.layers.size(); ++i) {
    take_static_cache(c.keys[i], c.values[i], positions[i], c.a, &c.layers[i]);
    check(c.keys[i].size(2) == c.keys[0].size(2), "the caches of the layers have different capacities");
  }
  see_all_shown(c.mask, c.a, &c.layers);
  stack[0] = run_decoder(&c.a, c.layers, c.x, c.mask, c.keys[0].size(2)).release();
}

}  // namespace
}  // namespace mono_quant

void mono_quant_release_decoder_layers(int64_t number) {
  mono_quant::HeldLayers<mono_quant::HeldDecoder>::all().drop(number);
}

STABLE_TORCH_LIBRARY_IMPL(mono_quant, CPU, m) {
  m.impl("hold_decoder_layers", &mono_quant::hold_decoder_layers);
  m.impl("decoder_layers", &mono_quant::decoder_layers);
  m.impl("decoder_layers_static_cache", &mono_quant::decoder_layers_static_cache);
}
