// decoder_layer, decoder_layer_static_cache: one layer of a decoder of the Llama family in one call, with a cache that
// grows from call to call or one that has room for all tokens from the start.
#include "decoder_run.h"
#include "layer_operands.h"

namespace mono_quant {
namespace {

constexpr int64_t kLinears = 7, kNormTensors = 2;

// Angles [samples or 1, length, depth].
const float* take_angles(Tensor& t, const DecoderArgs& a, int64_t* stride) {
  const bool fits = t.dim() == 3 && (t.size(0) == 1 || t.size(0) == a.samples) && t.size(1) == a.length &&
                    t.size(2) == a.depth && t.dtype() == aoti_torch_dtype_float32();
  check(fits, "the angles must be float32 [samples or 1, length, depth]");
  t.make_contiguous();
  *stride = t.size(0) == 1 ? 0 : a.length * a.depth;
  return t.data<float>();
}

// Keys or values of the past [samples, key heads, past, depth], rows and their elements side by side.
const float* take_past(Tensor& t, DecoderArgs* a) {
  const bool fits = t.dim() == 4 && t.size(0) == a->samples && t.size(1) == a->key_heads && t.size(3) == a->depth &&
                    t.dtype() == aoti_torch_dtype_float32();
  check(fits, "keys and values must be float32 [samples, key heads, length, depth]");
  if (t.numel() > 0 && (t.stride(3) != 1 || t.stride(2) != a->depth)) t.make_contiguous();
  return t.data<float>();
}

void take_weights(std::vector<Tensor>& weights, Activation activation, DecoderArgs* a) {
  check((int64_t)weights.size() == kLinears * kTensorsEach + kNormTensors, "decoder_layer got another number of weights");
  PackedLayer* const layers[] = {&a->query, &a->key, &a->value, &a->output, &a->gate, &a->up, &a->down};
  const int64_t queries = a->heads * a->depth, keys = a->key_heads * a->depth;
  for (int64_t i = 0; i < kLinears; ++i) {
    const int64_t inputs = i == 3 ? queries : i == 6 ? a->up.outputs : a->width;
    *layers[i] = take_layer(weights, i * kTensorsEach, inputs, i == 4 ? activation : kNone);
    const int64_t outputs = i == 0 ? queries : i < 3 ? keys : i == 4 || i == 5 ? layers[4]->outputs : a->width;
    check(layers[i]->outputs == outputs, "a layer of the decoder has another width");
    check(inputs <= kDeepestLayer, "a layer of the decoder is too deep for one call");
  }
  const int64_t norms = kLinears * kTensorsEach;
  for (int64_t i = 0; i < kNormTensors; ++i) {
    expect(weights[(size_t)(norms + i)], "the norm's weight", aoti_torch_dtype_float32(), a->width);
  }
  a->attention_norm = weights[(size_t)norms].data<float>();
  a->output_norm = weights[(size_t)norms + 1].data<float>();
}

// What the operators take, kept for the call.
struct Call {
  Tensor x, keys, values, cosine, sine, mask;
  std::vector<Tensor> weights;
  std::vector<float> mask_values;
  Activation activation = kNone;
  DecoderArgs a = {};
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
  DecoderArgs& a = c->a;
  a.heads = take_int(rest[4]);
  a.scale = (float)take_float(rest[5]);
  a.attention_eps = (float)take_float(rest[6]);
  a.output_eps = (float)take_float(rest[7]);
  a.causal = take_bool(rest[8]);
  c->activation = activation_from(take_string(rest[9]));
  Tensor &x = c->x, &keys = c->keys, &values = c->values;
  check(x.dim() == 3 && x.dtype() == aoti_torch_dtype_float32(), "decoder_layer takes float32 [samples, length, width]");
  check(keys.dim() == 4 && values.dim() == 4, "keys and values must have four dimensions");
  x.make_contiguous();
  a.samples = x.size(0);
  a.length = x.size(1);
  a.width = x.size(2);
  a.key_heads = keys.size(1);
  a.depth = keys.size(3);
  check(a.width > 0 && a.key_heads > 0 && a.depth > 0 && a.depth % 2 == 0, "the heads have no even depth");
  check(a.heads > 0 && a.heads % a.key_heads == 0, "the heads are not a multiple of the heads of keys");
  check(values.size(2) == keys.size(2), "keys and values have different lengths");
}

void take_angles_and_weights(Call* c) {
  int64_t sine_stride = 0;
  c->a.cosine = take_angles(c->cosine, c->a, &c->a.angle_stride);
  c->a.sine = take_angles(c->sine, c->a, &sine_stride);
  check(sine_stride == c->a.angle_stride, "cosine and sine have different shapes");
  take_weights(c->weights, c->activation, &c->a);
}

// Of a mask [.., capacity], as many columns as are attended to.
void take_mask(Call* c, int64_t capacity) {
  if (!c->mask) return;
  c->mask_values = additive_mask(c->mask, c->a.samples, c->a.length, capacity, c->a.seen, &c->a.mask_rows);
  c->a.mask = c->mask_values.data();
}

Tensor run(Call* c) {
  Tensor out = Tensor::empty({c->a.samples, c->a.length, c->a.width}, aoti_torch_dtype_float32());
  if (out.numel() > 0) {
    c->a.x = c->x.data<float>();
    c->a.out = out.mutable_data<float>();
    DecoderRun(c->a).run();
  } else if (c->a.samples > 0 && c->a.seen > 0) {
    fail("decoder_layer got no tokens");
  }
  return out;
}

// ---- decoder_layer(Tensor x, Tensor past_keys, Tensor past_values, Tensor cosine, Tensor sine, Tensor? mask,
// ----               Tensor[] weights, int heads, float scale, float attention_eps, float output_eps, bool causal,
// ----               str activation) -> (Tensor, Tensor, Tensor)

void decoder_layer(StableIValue* stack, uint64_t, uint64_t) {
  Call c;
  take_operands(stack, stack + 3, &c);
  DecoderArgs& a = c.a;
  a.past = c.keys.size(2);
  a.seen = a.past + a.length;
  a.past_keys = take_past(c.keys, &a);
  a.past_values = take_past(c.values, &a);
  if (c.keys.stride(0) != c.values.stride(0) || c.keys.stride(1) != c.values.stride(1)) {
    c.keys.make_contiguous();
    c.values.make_contiguous();
    a.past_keys = c.keys.data<float>();
    a.past_values = c.values.data<float>();
  }
  a.past_sample_stride = c.keys.stride(0);
  a.past_head_stride = c.keys.stride(1);
  take_angles_and_weights(&c);
  take_mask(&c, a.seen);
  Tensor keys = Tensor::empty({a.samples, a.key_heads, a.seen, a.depth}, aoti_torch_dtype_float32());
  Tensor values = Tensor::empty({a.samples, a.key_heads, a.seen, a.depth}, aoti_torch_dtype_float32());
  a.keys = keys.mutable_data<float>();
  a.values = values.mutable_data<float>();
  a.head_stride = a.seen * a.depth;
  a.sample_stride = a.key_heads * a.head_stride;
  Tensor out = run(&c);
  stack[0] = out.release();
  stack[1] = keys.release();
  stack[2] = values.release();
}

// Keys or values of a static cache: written in place, so they cannot be copied into order.
float* take_cache(const Tensor& t, const DecoderArgs& a) {
  const bool fits = t.size(0) == a.samples && t.size(1) == a.key_heads && t.size(3) == a.depth &&
                    t.dtype() == aoti_torch_dtype_float32();
  check(fits, "keys and values must be float32 [samples, key heads, capacity, depth]");
  check(t.numel() == 0 || (t.stride(3) == 1 && t.stride(2) == a.depth), "the rows of keys and values must be dense");
  return t.mutable_data<float>();
}

// The number of keys up to the last that a row of the mask [.., capacity] shows, at least `keys`.
int64_t last_seen(const Tensor& mask, int64_t keys) {
  if (mask.dim() != 4) return keys;
  const bool boolean = is_boolean_mask(mask);
  const bool* shown = boolean ? mask.data<bool>() : nullptr;
  const float* added = boolean ? nullptr : mask.data<float>();
  for (int64_t s = 0; s < mask.size(0); ++s) {
    for (int64_t r = 0; r < mask.size(2); ++r) {
      const int64_t row = s * mask.stride(0) + r * mask.stride(2);
      for (int64_t i = mask.size(3); i-- > keys;) {
        const int64_t at = row + i * mask.stride(3);
        if (boolean ? shown[at] : added[at] != -__builtin_inff()) keys = i + 1;
      }
    }
  }
  return keys;
}

// ---- decoder_layer_static_cache(Tensor x, Tensor(a!) keys, Tensor(b!) values, Tensor position, Tensor cosine,
// ----                            Tensor sine, Tensor? mask, Tensor[] weights, int heads, float scale,
// ----                            float attention_eps, float output_eps, bool causal, str activation) -> Tensor

void decoder_layer_static_cache(StableIValue* stack, uint64_t, uint64_t) {
  Call c;
  const Tensor position = take_tensor(stack[3]);
  take_operands(stack, stack + 4, &c);
  DecoderArgs& a = c.a;
  const int64_t capacity = c.keys.size(2);
  check(position.numel() == 1 && position.dtype() == aoti_torch_dtype_int64(), "the position must be one int64");
  a.past = *position.data<int64_t>();
  if (a.past < 0 || a.past + a.length > capacity) {
    fail("a cache for " + std::to_string(capacity) + " tokens got " + std::to_string(a.length) + " at position " +
         std::to_string(a.past) + "; make it larger, or reset it");
  }
  a.keys = take_cache(c.keys, a);
  a.values = take_cache(c.values, a);
  const bool alike = c.keys.stride(0) == c.values.stride(0) && c.keys.stride(1) == c.values.stride(1);
  check(alike, "keys and values must have the same strides");
  a.sample_stride = c.keys.stride(0);
  a.head_stride = c.keys.stride(1);
  a.seen = a.past + a.length;
  if (c.mask && !a.causal) a.seen = last_seen(c.mask, a.seen);
  take_angles_and_weights(&c);
  take_mask(&c, capacity);
  stack[0] = run(&c).release();
}

}  // namespace
}  // namespace mono_quant

STABLE_TORCH_LIBRARY_IMPL(mono_quant, CPU, m) {
  m.impl("decoder_layer", &mono_quant::decoder_layer);
  m.impl("decoder_layer_static_cache", &mono_quant::decoder_layer_static_cache);
}
