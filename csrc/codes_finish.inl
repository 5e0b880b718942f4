// From int32 sums to codes: scales, bias, addition, activation, one rounding, store.
//
// Bound: about nine instructions for each vector of sums, which are read from the first-level cache.

namespace {

using mono_quant::FinishArgs;

inline I32 load_codes(const uint8_t* p, int64_t count) {
  if (count >= kLanes) return load_u8(p);
  alignas(16) uint8_t padded[kLanes] = {0};
  memcpy(padded, p, (size_t)count);
  return load_u8(padded);
}

// At most one vector.
inline void store_some_codes(uint8_t* p, I32 v, int64_t count) {
  if (count >= kLanes) return store_codes(p, v);
  alignas(16) uint8_t last[kLanes];
  store_codes(last, v);
  if (count == 8) memcpy(p, last, 8);
  else memcpy(p, last, (size_t)count);
}

inline F32 hardswish(F32 v) {
  const F32 gate = min_keep(max_keep(add(v, splat(3.f)), splat(0.f)), splat(6.f));
  return mul(mul(v, gate), splat(1.f / 6.f));
}

// What belongs to the columns of one vector.
struct Lane {
  I32 offset;
  F32 scale, bias;
};

inline Lane lane_at(const FinishArgs& f, int64_t col) {
  return {load_i32(f.offset + col), load_f32(f.scale + col), load_f32(f.bias + col)};
}

template <bool kOther>
inline F32 real_value(const FinishArgs& f, const Lane& lane, const int32_t* sums, int64_t at, int64_t lanes) {
  F32 v = add(mul(to_f32(sub_i32(load_i32(sums), lane.offset)), lane.scale), lane.bias);
  if (kOther) {
    const I32 other = sub_i32(load_codes(f.other + at, lanes), splat_i32(f.other_zero));
    v = add(v, mul(to_f32(other), splat(f.other_scale)));
  }
  return v;
}

template <bool kOther, int kKind, bool kBounded>
inline I32 code_value(const FinishArgs& f, const Lane& lane, const int32_t* sums, int64_t at, int64_t lanes) {
  F32 v = real_value<kOther>(f, lane, sums, at, lanes);
  if (kKind == mono_quant::kHardswish) v = mul(hardswish(v), splat(f.inverse));
  if (kKind == mono_quant::kSwish) v = mul(activate<mono_quant::kSilu>(v), splat(f.inverse));
  if (kBounded || kKind != mono_quant::kClamp) v = min_keep(max_keep(v, splat(f.low)), splat(f.high));
  return add_i32(round_to_i32(v), splat_i32(f.zero));
}

// Rows of sums `stride` apart; the first is that of output pixel `pixel`, starting at column `col`. Columns first, so
// that what belongs to them stays in registers.
template <bool kOther, int kKind, bool kBounded>
void finish_codes(const FinishArgs& args, const int32_t* sums, int64_t stride, int64_t pixel, int64_t rows, int64_t col,
                  int64_t cols) {
  const FinishArgs f = args;  // a copy that stores through `out` cannot be suspected to change
  const int64_t first = pixel * f.outputs + col;
  uint8_t* out = (uint8_t*)f.out;
  int64_t c = 0;
  for (; c + 4 * kLanes <= cols; c += 4 * kLanes) {
    Lane lane[4];
    for (int j = 0; j < 4; ++j) lane[j] = lane_at(f, col + c + j * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = first + r * f.outputs + c;
      I32 v[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t to = c + j * kLanes;
        v[j] = code_value<kOther, kKind, kBounded>(f, lane[j], sums + r * stride + to, at + j * kLanes, kLanes);
      }
      store_codes4(out + at, v[0], v[1], v[2], v[3]);
    }
  }
  for (; c < cols; c += kLanes) {
    const int64_t lanes = mono_quant::smaller(kLanes, cols - c);
    const Lane lane = lane_at(f, col + c);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = first + r * f.outputs + c;
      store_some_codes(out + at, code_value<kOther, kKind, kBounded>(f, lane, sums + r * stride + c, at, lanes), lanes);
    }
  }
}

template <bool kOther>
void finish_floats(const FinishArgs& f, const int32_t* sums, int64_t stride, int64_t pixel, int64_t rows, int64_t col,
                   int64_t cols) {
  for (int64_t r = 0; r < rows; ++r, sums += stride) {
    const int64_t first = (pixel + r) * f.outputs + col;
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int64_t lanes = mono_quant::smaller(kLanes, cols - c);
      alignas(64) float values[kLanes];
      store_f32(values, real_value<kOther>(f, lane_at(f, col + c), sums + c, first + c, lanes));
      memcpy((float*)f.out + first + c, values, (size_t)lanes * 4);
    }
  }
}

typedef void (*FinishRows)(const FinishArgs&, const int32_t*, int64_t, int64_t, int64_t, int64_t, int64_t);

template <bool kOther>
FinishRows finish_rows(const FinishArgs& f) {
  switch (f.kind) {
    case mono_quant::kHardswish: return finish_codes<kOther, mono_quant::kHardswish, true>;
    case mono_quant::kSwish: return finish_codes<kOther, mono_quant::kSwish, true>;
    case mono_quant::kFloat: return finish_floats<kOther>;
    default:
      return f.bounded ? finish_codes<kOther, mono_quant::kClamp, true>
                       : finish_codes<kOther, mono_quant::kClamp, false>;
  }
}

inline FinishRows finish_rows_for(const FinishArgs& f) { return f.other ? finish_rows<true>(f) : finish_rows<false>(f); }

}  // namespace
