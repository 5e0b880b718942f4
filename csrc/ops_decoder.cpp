// decoder_layer, decoder_layer_static_cache: one layer of a decoder of the Llama family in one call, with a cache that
// grows from call to call or one that has room for all tokens from the start.
#include "decoder_operands.h"

namespace mono_quant {
namespace {

// What the operators take, kept for the call.
struct Call {
  Tensor x, keys, values, cosine, sine, mask;
  std::vector<Tensor> weights;
  Floats floats;
  DecoderArgs a = {};
  std::vector<DecoderLayer> layers = std::vector<DecoderLayer>(1);
};

// Both begin with x, keys and values; from the angles at `rest` on, they go on with cosine, sine, mask, weights, heads,
// scale, attention_eps, output_eps, causal and activation.
void take_operands(StableIValue* stack, StableIValue* rest, Call* c) {
  c->x = take_tensor(stack[0]);
  c->keys = take_tensor(stack[1]);
  c->values = take_tensor(stack[2]);
  c->cosine = take_tensor(rest[0]);
  c->sine = take_tensor(rest[1]);
  c->mask = take_optional_tensor(rest[2]);
  c->weights = take_tensors(rest[3]);
  DecoderShape shape = {};
  shape.heads = take_int(rest[4]);
  c->a.scale = (float)take_float(rest[5]);
  c->layers[0].attention_eps = (float)take_float(rest[6]);
  c->layers[0].output_eps = (float)take_float(rest[7]);
  c->a.causal = take_bool(rest[8]);
  shape.activation = activation_from(take_string(rest[9]));
  check(c->x.dim() == 3, "decoder layers take [samples, length, width]");
  check(c->keys.dim() == 4 && c->values.dim() == 4, "keys and values must have four dimensions");
  check((int64_t)c->weights.size() == kDecoderTensors, "decoder_layer got another number of weights");
  shape.dtype = layer_type(c->x, "the input of decoder layers");
  shape.width = c->x.size(2);
  shape.key_heads = c->keys.size(1);
  shape.depth = c->keys.size(3);
  check_heads(shape);
  take_inputs(c->x, c->cosine, c->sine, shape, &c->floats, &c->a);
  take_weights(c->weights, 0, shape, &c->floats, &c->layers[0]);
  Tensor* const norms = &c->weights[kDecoderLinears * kTensorsEach];
  for (int64_t n = 0; n < kDecoderNorms; ++n) norms[n].make_contiguous();
  take_norms(norms, shape, &c->floats, &c->layers[0]);
}

// ---- decoder_layer(Tensor x, Tensor past_keys, Tensor past_values, Tensor cosine, Tensor sine, Tensor? mask,
// ----               Tensor[] weights, int heads, float scale, float attention_eps, float output_eps, bool causal,
// ----               str activation) -> (Tensor, Tensor, Tensor)

void decoder_layer(StableIValue* stack, uint64_t, uint64_t) {
  Call c;
  take_operands(stack, stack + 3, &c);
  Tensor keys, values;
  take_growing_cache(c.keys, c.values, c.a, &c.layers[0], &keys, &values);
  stack[0] = run_decoder(&c.a, c.layers, c.x, c.mask, c.layers[0].seen).release();
  stack[1] = keys.release();
  stack[2] = values.release();
}

// ---- decoder_layer_static_cache(Tensor x, Tensor(a!) keys, Tensor(b!) values, Tensor position, Tensor cosine,
// ----                            Tensor sine, Tensor? mask, Tensor[] weights, int heads, float scale,
// ----                            float attention_eps, float output_eps, bool causal, str activation) -> Tensor

void decoder_layer_static_cache(StableIValue* stack, uint64_t, uint64_t) {
  Call c;
  const Tensor position = take_tensor(stack[3]);
  take_operands(stack, stack + 4, &c);
  take_static_cache(c.keys, c.values, position, c.a, &c.layers[0]);
  see_all_shown(c.mask, c.a, &c.layers);
  stack[0] = run_decoder(&c.a, c.layers, c.x, c.mask, c.keys.size(2)).release();
}

}  // namespace
}  // namespace mono_quant

STABLE_TORCH_LIBRARY_IMPL(mono_quant, CPU, m) {
  m.impl("decoder_layer", &mono_quant::decoder_layer);
  m.impl("decoder_layer_static_cache", &mono_quant::decoder_layer_static_cache);
}
