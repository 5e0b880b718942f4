// decoder_layer: one layer of a decoder of the Llama family in one call.
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

// ---- decoder_layer(Tensor x, Tensor past_keys, Tensor past_values, Tensor cosine, Tensor sine, Tensor? mask,
// ----               Tensor[] weights, int heads, float scale, float attention_eps, float output_eps, bool causal,
// ----               str activation) -> (Tensor, Tensor, Tensor)

void decoder_layer(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]), past_keys = take_tensor(stack[1]), past_values = take_tensor(stack[2]);
  Tensor cosine = take_tensor(stack[3]), sine = take_tensor(stack[4]), mask = take_optional_tensor(stack[5]);
  std::vector<Tensor> weights = take_tensors(stack[6]);
  DecoderArgs a = {};
  a.heads = take_int(stack[7]);
  a.scale = (float)take_float(stack[8]);
  a.attention_eps = (float)take_float(stack[9]);
  a.output_eps = (float)take_float(stack[10]);
  a.causal = take_bool(stack[11]);
  const Activation activation = activation_from(take_string(stack[12]));
  check(x.dim() == 3 && x.dtype() == aoti_torch_dtype_float32(), "decoder_layer takes float32 [samples, length, width]");
  check(past_keys.dim() == 4 && past_values.dim() == 4, "keys and values must have four dimensions");
  x.make_contiguous();
  a.samples = x.size(0);
  a.length = x.size(1);
  a.width = x.size(2);
  a.key_heads = past_keys.size(1);
  a.past = past_keys.size(2);
  a.depth = past_keys.size(3);
  check(a.width > 0 && a.key_heads > 0 && a.depth > 0 && a.depth % 2 == 0, "the heads have no even depth");
  check(a.heads > 0 && a.heads % a.key_heads == 0, "the heads are not a multiple of the heads of keys");
  check(past_values.size(2) == a.past, "keys and values have different lengths");
  a.past_keys = take_past(past_keys, &a);
  a.past_values = take_past(past_values, &a);
  if (past_keys.stride(0) != past_values.stride(0) || past_keys.stride(1) != past_values.stride(1)) {
    past_keys.make_contiguous();
    past_values.make_contiguous();
    a.past_keys = past_keys.data<float>();
    a.past_values = past_values.data<float>();
  }
  a.past_sample_stride = past_keys.stride(0);
  a.past_head_stride = past_keys.stride(1);
  int64_t sine_stride = 0;
  a.cosine = take_angles(cosine, a, &a.angle_stride);
  a.sine = take_angles(sine, a, &sine_stride);
  check(sine_stride == a.angle_stride, "cosine and sine have different shapes");
  take_weights(weights, activation, &a);
  std::vector<float> mask_values;
  if (mask) {
    mask_values = additive_mask(mask, a.samples, a.length, a.past + a.length, &a.mask_rows);
    a.mask = mask_values.data();
  }
  const int32_t f32 = aoti_torch_dtype_float32();
  Tensor out = Tensor::empty({a.samples, a.length, a.width}, f32);
  Tensor keys = Tensor::empty({a.samples, a.key_heads, a.past + a.length, a.depth}, f32);
  Tensor values = Tensor::empty({a.samples, a.key_heads, a.past + a.length, a.depth}, f32);
  a.keys = keys.mutable_data<float>();
  a.values = values.mutable_data<float>();
  if (out.numel() > 0) {
    a.x = x.data<float>();
    a.out = out.mutable_data<float>();
    DecoderRun(a).run();
  } else if (keys.numel() > 0) {
    fail("decoder_layer got no tokens");
  }
  stack[0] = out.release();
  stack[1] = keys.release();
  stack[2] = values.release();
}

}  // namespace
}  // namespace mono_quant

STABLE_TORCH_LIBRARY_IMPL(mono_quant, CPU, m) { m.impl("decoder_layer", &mono_quant::decoder_layer); }
