// Steps on codes without a weight: quantization of images, maxima, sums over pixels, addition, multiplication.
//
// Bound: reads and writes of the first- and second-level cache.

namespace {

using mono_quant::AddArgs;
using mono_quant::MultiplyArgs;
using mono_quant::PoolArgs;
using mono_quant::QuantizeArgs;

inline void max_into(uint8_t* out, const uint8_t* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = out[i] > x[i] ? out[i] : x[i];
}

void max_pool(const PoolArgs& p, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t sample = row / p.out_height, top = row % p.out_height * p.stride_h - p.pad_h;
    const uint8_t* image = p.x + sample * p.height * p.width * p.channels;
    for (int64_t ox = 0; ox < p.out_width; ++ox) {
      uint8_t* out = p.out + (row * p.out_width + ox) * p.channels;
      bool empty = true;
      for (int64_t i = 0; i < p.kernel_h; ++i) {
        const int64_t y = top + i * p.dilation_h;
        if (y < 0 || y >= p.height) continue;
        for (int64_t j = 0; j < p.kernel_w; ++j) {
          const int64_t x = ox * p.stride_w - p.pad_w + j * p.dilation_w;
          if (x < 0 || x >= p.width) continue;
          const uint8_t* from = image + (y * p.width + x) * p.channels;
          if (empty) memcpy(out, from, (size_t)p.channels);
          else max_into(out, from, p.channels);
          empty = false;
        }
      }
      if (empty) memset(out, 0, (size_t)p.channels);
    }
  }
}

void channel_sums(const uint8_t* x, int64_t pixels, int64_t channels, int32_t* sums) {
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  for (int64_t i = 0; i < pixels; ++i, x += channels) {
    for (int64_t c = 0; c < channels; ++c) sums[c] += x[c];
  }
}

inline I32 bounded_code(F32 v, float low, float high, int32_t zero) {
  return add_i32(round_to_i32(min_keep(max_keep(v, splat(low)), splat(high))), splat_i32(zero));
}

void add_codes(const AddArgs& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t lanes = mono_quant::smaller(kLanes, end - i);
    const F32 a = mul(to_f32(load_codes(p.a + i, lanes)), splat(p.a_scale));
    const F32 b = mul(to_f32(load_codes(p.b + i, lanes)), splat(p.b_scale));
    store_some_codes(p.out + i, bounded_code(add(add(a, b), splat(p.shift)), p.low, p.high, p.zero), lanes);
  }
}

void multiply_codes(const MultiplyArgs& p, int64_t begin, int64_t end) {
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const uint8_t* a = p.a + pixel * p.channels;
    const uint8_t* b = p.b + (p.gate ? pixel / p.pixels : pixel) * p.channels;
    uint8_t* out = p.out + pixel * p.channels;
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      const int64_t lanes = mono_quant::smaller(kLanes, p.channels - c);
      const I32 x = sub_i32(load_codes(a + c, lanes), splat_i32(p.a_zero));
      const I32 y = sub_i32(load_codes(b + c, lanes), splat_i32(p.b_zero));
      const F32 v = mul(to_f32(mul_i32(x, y)), splat(p.scale));
      store_some_codes(out + c, bounded_code(v, p.low, p.high, p.zero), lanes);
    }
  }
}

// `count` values, `stride` apart; answers whether one is NaN.
bool quantize_line(const float* x, int64_t stride, int64_t count, const QuantizeArgs& p, uint8_t* codes) {
  const float low = (float)-p.zero, high = (float)(255 - p.zero);
  bool nan = false;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t lanes = mono_quant::smaller(kLanes, count - i);
    F32 v;
    if (stride == 1 && lanes == kLanes) {
      v = load_f32(x + i);
    } else {
      alignas(64) float values[kLanes] = {0};
      for (int64_t j = 0; j < lanes; ++j) values[j] = x[(i + j) * stride];
      v = load_f32(values);
    }
    nan |= any_nan(v);
    store_some_codes(codes + i, bounded_code(mul(v, splat(p.inverse)), low, high, p.zero), lanes);
  }
  return nan;
}

// A row of three planes, a pixel's codes joined in a register: it is most networks' input.
bool quantize_colours(const QuantizeArgs& p, const float* line, uint8_t* out) {
  constexpr int64_t kPixels = 256;
  uint8_t codes[3][kPixels];
  bool nan = false;
  for (int64_t x = 0; x < p.width; x += kPixels, out += kPixels * 3) {
    const int64_t count = mono_quant::smaller(kPixels, p.width - x);
    for (int64_t c = 0; c < 3; ++c) {
      nan |= quantize_line(line + x * p.stride_w + c * p.stride_c, p.stride_w, count, p, codes[c]);
    }
    for (int64_t j = 0; j + 1 < count; ++j) {
      // The fourth byte is the next pixel's, which comes after.
      const uint32_t pixel = codes[0][j] | (uint32_t)codes[1][j] << 8 | (uint32_t)codes[2][j] << 16;
      memcpy(out + 3 * j, &pixel, 4);
    }
    for (int64_t c = 0; c < 3; ++c) out[3 * (count - 1) + c] = codes[c][count - 1];
  }
  return nan;
}

bool quantize_image(const QuantizeArgs& p, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kPixels = 256;
  uint8_t codes[kPixels];
  bool nan = false;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* line = p.x + row / p.height * p.stride_n + row % p.height * p.stride_h;
    uint8_t* out = p.out + row * p.width * p.channels;
    if (p.stride_c == 1 && p.stride_w == p.channels) {
      nan |= quantize_line(line, 1, p.width * p.channels, p, out);
      continue;
    }
    if (p.channels == 3) {
      nan |= quantize_colours(p, line, out);
      continue;
    }
    for (int64_t x = 0; x < p.width; x += kPixels) {
      const int64_t count = mono_quant::smaller(kPixels, p.width - x);
      for (int64_t c = 0; c < p.channels; ++c) {
        nan |= quantize_line(line + x * p.stride_w + c * p.stride_c, p.stride_w, count, p, codes);
        for (int64_t j = 0; j < count; ++j) out[(x + j) * p.channels + c] = codes[j];
      }
    }
  }
  return nan;
}

const mono_quant::CodeKernels kCodeKernels = {
    conv_scratch_bytes, conv, depthwise_scratch_bytes, depthwise, max_pool, channel_sums, add_codes, multiply_codes,
    quantize_image,
};

}  // namespace
