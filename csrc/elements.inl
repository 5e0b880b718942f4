// Elements of float32, bfloat16 or float16 as lanes of float32 or in arrays of it, and back.

namespace {

template <int kType>
inline F32 load_x(const void* p, int64_t i) {
  if (kType == mono_quant::kFloat32) return load_f32((const float*)p + i);
  if (kType == mono_quant::kBFloat16) return load_bf16((const uint16_t*)p + i);
  return load_f16((const uint16_t*)p + i);
}

template <int kType>
inline void store_x(void* p, int64_t i, F32 v) {
  if (kType == mono_quant::kFloat32) return store_f32((float*)p + i, v);
  if (kType == mono_quant::kBFloat16) return store_bf16((uint16_t*)p + i, v);
  store_f16((uint16_t*)p + i, v);
}

template <int kType>
constexpr int64_t element_size() {
  return kType == mono_quant::kFloat32 ? 4 : 2;
}

inline int64_t element_size(mono_quant::DType dtype) { return dtype == mono_quant::kFloat32 ? 4 : 2; }

// The last `count` < kLanes elements of a row, zeros behind them: zero changes neither end of the range.
template <int kType>
inline F32 load_x_tail(const void* p, int64_t i, int64_t count) {
  alignas(64) char padded[kLanes * 4];
  memset(padded, 0, sizeof(padded));
  memcpy(padded, (const char*)p + i * element_size<kType>(), (size_t)(count * element_size<kType>()));
  return load_x<kType>(padded, 0);
}

// Stores the first `count` < kLanes lanes.
template <int kType>
inline void store_x_tail(void* p, int64_t i, F32 v, int64_t count) {
  alignas(64) char last[kLanes * 4];
  store_x<kType>(last, 0, v);
  memcpy((char*)p + i * element_size<kType>(), last, (size_t)(count * element_size<kType>()));
}

// The first `count` lanes, zeros behind them.
inline F32 load_some(const float* p, int64_t count) {
  if (count >= kLanes) return load_f32(p);
  alignas(64) float padded[kLanes] = {0};
  memcpy(padded, p, (size_t)count * 4);
  return load_f32(padded);
}

inline void store_some(float* p, F32 v, int64_t count) {
  if (count >= kLanes) return store_f32(p, v);
  alignas(64) float lanes[kLanes];
  store_f32(lanes, v);
  memcpy(p, lanes, (size_t)count * 4);
}

template <int kType>
void widen_typed(const void* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_f32(to + i, load_x<kType>(from, i));
  if (i < count) store_some(to + i, load_x_tail<kType>(from, i, count - i), count - i);
}

template <int kType>
void narrow_typed(const float* from, void* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_x<kType>(to, i, load_f32(from + i));
  if (i < count) store_x_tail<kType>(to, i, load_some(from + i, count - i), count - i);
}

}  // namespace
