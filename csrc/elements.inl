// Elements of float32, bfloat16 or float16 as lanes of float32, and back.

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

}  // namespace
