// Row quantization: float32, bfloat16 or float16 rows to uint8 codes with one scale and zero point per row.
//
// Bound: reads. Two passes over a row, the second from L1; about five instructions for 16 elements in each.

namespace {

template <int kType>
void quantize_row(const void* x, int64_t k, uint8_t* codes, int64_t code_stride, float* scale, int32_t* zero_point) {
  F32 low[2] = {splat(0.f), splat(0.f)}, high[2] = {splat(0.f), splat(0.f)};
  // x * 0 is NaN for NaN and for infinities, 0 for all else: one multiply-add finds both.
  F32 poison[2] = {splat(0.f), splat(0.f)};
  const F32 zero = splat(0.f);
  int64_t i = 0;
  for (; i + 2 * kLanes <= k; i += 2 * kLanes) {
    for (int j = 0; j < 2; ++j) {
      const F32 v = load_x<kType>(x, i + j * kLanes);
      low[j] = min_keep(v, low[j]);
      high[j] = max_keep(v, high[j]);
      poison[j] = fma(v, zero, poison[j]);
    }
  }
  for (; i < k; i += kLanes) {
    const F32 v = k - i >= kLanes ? load_x<kType>(x, i) : load_x_tail<kType>(x, i, k - i);
    low[0] = min_keep(v, low[0]);
    high[0] = max_keep(v, high[0]);
    poison[0] = fma(v, zero, poison[0]);
  }
  if (any_nan(add(poison[0], poison[1]))) {
    *scale = __builtin_nanf("");
    *zero_point = 0;
    memset(codes, 0, (size_t)code_stride);
    return;
  }
  const float least = lowest_lane(min_keep(low[0], low[1]));
  const float most = highest_lane(max_keep(high[0], high[1]));
  float s = most / 255.f - least / 255.f;
  if (s < 1.17549435e-38f) s = 1.17549435e-38f;
  const float inverse = 1.f / s;
  const float shift = -least * inverse;
  // Round half to even without a library call; the value is in [0, 255] but for rounding of the scale.
  int32_t zp;
  {
    float lanes[kLanes];
    int32_t rounded[kLanes];
    for (int j = 0; j < kLanes; ++j) lanes[j] = shift;
    store_i32(rounded, round_to_i32(load_f32(lanes)));
    zp = rounded[0] < 0 ? 0 : rounded[0] > 255 ? 255 : rounded[0];
  }
  *scale = s;
  *zero_point = zp;

  const F32 inv = splat(inverse);
  const I32 zp_lanes = splat_i32(zp);
  i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
    I32 q[4];
    for (int j = 0; j < 4; ++j) {
      q[j] = add_i32(round_to_i32(mul(load_x<kType>(x, i + j * kLanes), inv)), zp_lanes);
    }
    store_codes4(codes + i, q[0], q[1], q[2], q[3]);
  }
  for (; i + kLanes <= k; i += kLanes) {
    store_codes(codes + i, add_i32(round_to_i32(mul(load_x<kType>(x, i), inv)), zp_lanes));
  }
  if (i < k) {
    uint8_t last[kLanes];
    store_codes(last, add_i32(round_to_i32(mul(load_x_tail<kType>(x, i, k - i), inv)), zp_lanes));
    memcpy(codes + i, last, (size_t)(k - i));
  }
  memset(codes + k, 0, (size_t)(code_stride - k));
}

void quantize_rows(const void* x, mono_quant::DType dtype, int64_t x_stride, int64_t rows, int64_t k, uint8_t* codes,
                   int64_t code_stride, float* scale, int32_t* zero_point) {
  for (int64_t r = 0; r < rows; ++r) {
    const void* row = (const char*)x + r * x_stride * element_size(dtype);
    uint8_t* c = codes + r * code_stride;
    if (dtype == mono_quant::kFloat32) quantize_row<mono_quant::kFloat32>(row, k, c, code_stride, scale + r, zero_point + r);
    else if (dtype == mono_quant::kBFloat16) quantize_row<mono_quant::kBFloat16>(row, k, c, code_stride, scale + r, zero_point + r);
    else quantize_row<mono_quant::kFloat16>(row, k, c, code_stride, scale + r, zero_point + r);
  }
}

template <int kType>
void embedding_rows(const int64_t* index, int64_t count, const int8_t* weight, int64_t dim, const float* scale,
                    const int8_t* zero_point, void* out) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = index[r];
    const int8_t* w = weight + row * dim;
    const F32 s = splat(scale[row]);
    const I32 z = splat_i32(zero_point ? zero_point[row] : 0);
    char* o = (char*)out + r * dim * element_size<kType>();
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) store_x<kType>(o, i, mul(to_f32(sub_i32(load_i8(w + i), z)), s));
    if (i < dim) {
      int8_t in[kLanes] = {0};
      alignas(64) char last[kLanes * 4];
      memcpy(in, w + i, (size_t)(dim - i));
      store_x<kType>(last, 0, mul(to_f32(sub_i32(load_i8(in), z)), s));
      memcpy(o + i * element_size<kType>(), last, (size_t)((dim - i) * element_size<kType>()));
    }
  }
}

void embedding(const int64_t* index, int64_t count, const int8_t* weight, int64_t dim, const float* scale,
               const int8_t* zero_point, mono_quant::DType dtype, void* out) {
  if (dtype == mono_quant::kFloat32)
    embedding_rows<mono_quant::kFloat32>(index, count, weight, dim, scale, zero_point, out);
  else if (dtype == mono_quant::kBFloat16)
    embedding_rows<mono_quant::kBFloat16>(index, count, weight, dim, scale, zero_point, out);
  else embedding_rows<mono_quant::kFloat16>(index, count, weight, dim, scale, zero_point, out);
}

}  // namespace
