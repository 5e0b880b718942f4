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

// The same where a branch for each vector is small beside the rest.
inline F32 activate_by(mono_quant::Activation activation, F32 v) {
  switch (activation) {
    case mono_quant::kRelu: return activate<mono_quant::kRelu>(v);
    case mono_quant::kGelu: return activate<mono_quant::kGelu>(v);
    case mono_quant::kGeluTanh: return activate<mono_quant::kGeluTanh>(v);
    case mono_quant::kSilu: return activate<mono_quant::kSilu>(v);
    default: return v;
  }
}

}  // namespace
