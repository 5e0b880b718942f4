// Operands of the operators that run layers of decoders.
#pragma once

#include "decoder_run.h"
#include "layer_operands.h"

namespace mono_quant {

constexpr int64_t kDecoderLinears = 7, kDecoderNorms = 2;
// Far beyond what any memory holds, and small enough that sizes made of them do not overflow.
constexpr int64_t kMostHeads = 1 << 24;
constexpr int64_t kDecoderTensors = kDecoderLinears * kTensorsEach + kDecoderNorms;

// Sizes and numbers that all layers of a decoder share.
struct DecoderShape {
  DType dtype;
  int64_t width, heads, key_heads, depth;
  Activation activation;
};

inline void check_heads(const DecoderShape& s) {
  check(s.width > 0 && s.key_heads > 0 && s.depth > 0 && s.depth % 2 == 0, "the heads have no even depth");
  check(s.heads > 0 && s.heads % s.key_heads == 0, "the heads are not a multiple of the heads of keys");
  check(s.heads <= kMostHeads && s.depth <= kMostHeads, "there are too many heads, or they are too deep");
}

// The weights of the norms of a layer, as they are now.
inline void take_norms(const Tensor* norms, const DecoderShape& shape, Floats* floats, DecoderLayer* layer) {
  const int32_t dtype = shape.dtype == kFloat32 ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  const float** const to[kDecoderNorms] = {&layer->attention_norm, &layer->output_norm};
  for (int64_t n = 0; n < kDecoderNorms; ++n) {
    const void* data = norms[n].data_now(dtype, shape.width);
    if (!data) fail("a norm's weight does not fit the layers, or has been given data of another kind");
    *to[n] = floats->of(data, shape.dtype, shape.width);
  }
}

// The kDecoderTensors of a layer, from `at` on, but for its norms.
inline void take_weights(std::vector<Tensor>& weights, int64_t at, const DecoderShape& shape, Floats* floats,
                         DecoderLayer* layer) {
  const std::array<PackedLayer*, kDecoderLinears> layers = layer->linears();
  const int64_t queries = shape.heads * shape.depth, keys = shape.key_heads * shape.depth;
  for (int64_t i = 0; i < kDecoderLinears; ++i) {
    const int64_t inputs = i == 3 ? queries : i == 6 ? layer->up.outputs : shape.width;
    const int64_t first = at + i * kTensorsEach;
    const bool words = weights[(size_t)first].dtype() == aoti_torch_dtype_int32();
    *layers[i] = (words ? take_words : take_layer)(weights, first, inputs, i == 4 ? shape.activation : kNone, floats);
    const int64_t outputs = i == 0 ? queries : i < 3 ? keys : i == 4 || i == 5 ? layers[4]->outputs : shape.width;
    check(layers[i]->outputs == outputs, "a layer of the decoder has another width");
    check(words || inputs <= kDeepestLayer, "a layer of the decoder is too deep for one call");
  }
}

// Angles [samples or 1, length, depth].
inline const float* take_angles(Tensor& t, const DecoderArgs& a, Floats* floats, int64_t* stride) {
  const bool fits = t.dim() == 3 && (t.size(0) == 1 || t.size(0) == a.samples) && t.size(1) == a.length &&
                    t.size(2) == a.depth;
  check(fits, "the angles must be [samples or 1, length, depth]");
  const DType dtype = layer_type(t, "the angles");
  t.make_contiguous();
  *stride = t.size(0) == 1 ? 0 : a.length * a.depth;
  return floats->of(t.data<void>(), dtype, t.numel());
}

// What the layers have in common and the cache takes no part in.
inline void take_inputs(Tensor& x, Tensor& cosine, Tensor& sine, const DecoderShape& shape, Floats* floats,
                        DecoderArgs* a) {
  check(x.dim() == 3, "decoder layers take [samples, length, width]");
  check(layer_type(x, "the input of decoder layers") == shape.dtype, "the input and the norms have different dtypes");
  x.make_contiguous();
  a->dtype = shape.dtype;
  a->x = x.data<void>();
  a->samples = x.size(0);
  a->length = x.size(1);
  a->width = x.size(2);
  check(a->width == shape.width, "the input has another width than the layers");
  a->heads = shape.heads;
  a->key_heads = shape.key_heads;
  a->depth = shape.depth;
  int64_t sine_stride = 0;
  a->cosine = take_angles(cosine, *a, floats, &a->angle_stride);
  a->sine = take_angles(sine, *a, floats, &sine_stride);
  check(sine_stride == a->angle_stride, "cosine and sine have different shapes");
}

// Keys or values of the past [samples, key heads, past, depth], rows and their elements side by side.
inline const char* take_past(Tensor& t, const DecoderArgs& a) {
  const bool fits = t.dim() == 4 && t.size(0) == a.samples && t.size(1) == a.key_heads && t.size(3) == a.depth &&
                    float_type(t.dtype(), "keys and values") == a.dtype;
  check(fits, "keys and values must be [samples, key heads, length, depth], of the input's dtype");
  if (t.numel() > 0 && (t.stride(3) != 1 || t.stride(2) != a.depth)) t.make_contiguous();
  return t.data<char>();
}

// A cache that grows: keys and values of the past, and new tensors with room for those of `x` behind them.
inline void take_growing_cache(Tensor& past_keys, Tensor& past_values, const DecoderArgs& a, DecoderLayer* layer,
                               Tensor* keys, Tensor* values) {
  layer->past_keys = take_past(past_keys, a);
  layer->past_values = take_past(past_values, a);
  check(past_keys.size(2) == past_values.size(2), "keys and values have different lengths");
  if (past_keys.stride(0) != past_values.stride(0) || past_keys.stride(1) != past_values.stride(1)) {
    past_keys.make_contiguous();
    past_values.make_contiguous();
    layer->past_keys = past_keys.data<char>();
    layer->past_values = past_values.data<char>();
  }
  layer->past_sample_stride = past_keys.stride(0);
  layer->past_head_stride = past_keys.stride(1);
  layer->past = past_keys.size(2);
  layer->seen = layer->past + a.length;
  *keys = Tensor::empty({a.samples, a.key_heads, layer->seen, a.depth}, past_keys.dtype());
  *values = Tensor::empty({a.samples, a.key_heads, layer->seen, a.depth}, past_keys.dtype());
  layer->keys = keys->mutable_data<char>();
  layer->values = values->mutable_data<char>();
  layer->head_stride = layer->seen * a.depth;
  layer->sample_stride = a.key_heads * layer->head_stride;
}

// Keys or values of a static cache: written in place, so they cannot be copied into order.
inline char* take_places(const Tensor& t, const DecoderArgs& a) {
  const bool fits = t.dim() == 4 && t.size(0) == a.samples && t.size(1) == a.key_heads && t.size(3) == a.depth &&
                    float_type(t.dtype(), "keys and values") == a.dtype;
  check(fits, "keys and values must be [samples, key heads, capacity, depth], of the input's dtype");
  check(t.numel() == 0 || (t.stride(3) == 1 && t.stride(2) == a.depth), "the rows of keys and values must be dense");
  return t.mutable_data<char>();
}

// The number of keys up to the last that a row of the mask [.., capacity] shows, at least `keys`.
inline int64_t last_seen(const Tensor& mask, int64_t keys) {
  if (mask.dim() != 4) return keys;
  const MaskElements elements(mask);
  for (int64_t s = 0; s < mask.size(0); ++s) {
    for (int64_t r = 0; r < mask.size(2); ++r) {
      const int64_t row = s * mask.stride(0) + r * mask.stride(2);
      for (int64_t i = mask.size(3); i-- > keys;) {
        if (elements.at(row + i * mask.stride(3)) != -__builtin_inff()) keys = i + 1;
      }
    }
  }
  return keys;
}

// A mask over a static cache may show places behind the last token.
inline void see_all_shown(const Tensor& mask, const DecoderArgs& a, std::vector<DecoderLayer>* layers) {
  if (!mask || a.causal) return;
  int64_t shown = layers->front().seen;
  for (const DecoderLayer& layer : *layers) shown = smaller(shown, layer.seen);
  shown = last_seen(mask, shown);
  for (DecoderLayer& layer : *layers) layer.seen = larger(layer.seen, shown);
}

// A cache with room for all tokens, `position` of which are there.
inline void take_static_cache(const Tensor& keys, const Tensor& values, const Tensor& position, const DecoderArgs& a,
                              DecoderLayer* layer) {
  layer->keys = take_places(keys, a);
  layer->values = take_places(values, a);
  const bool alike = keys.size(2) == values.size(2) && keys.stride(0) == values.stride(0) &&
                     keys.stride(1) == values.stride(1);
  check(alike, "keys and values must have the same length and strides");
  check(position.numel() == 1 && position.dtype() == aoti_torch_dtype_int64(), "the position must be one int64");
  const int64_t capacity = keys.size(2);
  layer->past = *position.data<int64_t>();
  if (layer->past < 0 || layer->past > capacity - a.length) {
    fail("a cache for " + std::to_string(capacity) + " tokens got " + std::to_string(a.length) + " at position " +
         std::to_string(layer->past) + "; make it larger, or reset it");
  }
  layer->past_keys = layer->past_values = nullptr;
  layer->sample_stride = keys.stride(0);
  layer->head_stride = keys.stride(1);
  layer->seen = layer->past + a.length;
}

// Runs the layers; `columns` is how many keys a mask has a column for.
// The output is of the dtype of `x`.
inline Tensor run_decoder(DecoderArgs* a, const std::vector<DecoderLayer>& layers, const Tensor& x, const Tensor& mask,
                          int64_t columns) {
  int64_t seen = 0;
  for (const DecoderLayer& layer : layers) seen = larger(seen, layer.seen);
  std::vector<float> mask_values;
  if (mask) {
    mask_values = additive_mask(mask, a->samples, a->length, columns, seen, &a->mask_rows);
    a->mask = mask_values.data();
    a->mask_stride = round_up(seen, kMaskColumns);
  }
  Tensor out = Tensor::empty({a->samples, a->length, a->width}, x.dtype());
  if (out.numel() > 0) {
    a->out = out.mutable_data<void>();
    DecoderRun(*a, layers).run();
  } else if (a->samples > 0 && seen > 0) {
    fail("decoder layers got no tokens");
  }
  return out;
}

}  // namespace mono_quant
