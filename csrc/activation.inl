// The activation of an operator by name; the unit chooses gelu.inl or gelu_table.inl before.

namespace {

template <int kActivation>
inline F32 activate(F32 v) {
  if (kActivation == mono_quant::kRelu) return max_keep(splat(0.f), v);
  if (kActivation == mono_quant::kGelu) return gelu(v);
  if (kActivation == mono_quant::kGeluTanh) return gelu_tanh(v);
  if (kActivation == mono_quant::kSilu) return silu(v);
  return v;
}

}  // namespace
