// Activations on float32 lanes, written so that relative accuracy holds in the tails too.

namespace {

// e^v for any v: argument reduction by ln 2 in two parts, a degree-6 polynomial (relative error 3e-9 before rounding,
// least squares reweighted towards minimax), and the power of two applied in two halves so that results below the
// smallest normal number and overflow to infinity come out right.
inline F32 exponential(F32 v) {
  v = min_keep(splat(104.f), max_keep(splat(-104.f), v));
  const I32 n = round_to_i32(mul(v, splat(1.44269504f)));
  const F32 nf = to_f32(n);
  F32 r = fma(nf, splat(-0.693359375f), v);
  r = fma(nf, splat(2.12194440e-4f), r);
  F32 p = splat(0.0013814610429108143f);
  p = fma(p, r, splat(0.008368710055947304f));
  p = fma(p, r, splat(0.04166838899254799f));
  p = fma(p, r, splat(0.1666652113199234f));
  p = fma(p, r, splat(0.4999999403953552f));
  p = fma(mul(p, r), r, r);
  p = add(p, splat(1.f));
  const I32 n1 = half_i32(n), n2 = sub_i32(n, n1);
  p = mul(p, bits_to_f32(shift_left<23>(add_i32(n1, splat_i32(127)))));
  return mul(p, bits_to_f32(shift_left<23>(add_i32(n2, splat_i32(127)))));
}

// x * Phi(x). The upper tail Q(a) = 1 - Phi(a) is exp(-a^2/2) * t * P(t) with t = 1/(1 + 0.2625 a): P of degree 8 is
// fitted to erfcx (relative error 1.8e-8 on [0, 14] before rounding).
inline F32 gelu(F32 x) {
  const F32 a = min_keep(splat(20.f), absolute(x));
  const F32 t = div(splat(1.f), fma(a, splat(0.2625f), splat(1.f)));
  F32 p = splat(0.030745645985007286f);
  p = fma(p, t, splat(-0.14881111681461334f));
  p = fma(p, t, splat(0.23476295173168182f));
  p = fma(p, t, splat(-0.13339316844940186f));
  p = fma(p, t, splat(0.1491394340991974f));
  p = fma(p, t, splat(0.055848848074674606f));
  p = fma(p, t, splat(0.10281864553689957f));
  p = fma(p, t, splat(0.10413887351751328f));
  p = fma(p, t, splat(0.1047498807311058f));
  const F32 square = mul(a, a);
  const F32 rest = fma(a, a, sub(splat(0.f), square));  // what rounding took from the square (0 without an FMA)
  F32 e = exponential(mul(square, splat(-0.5f)));
  e = fma(e, mul(rest, splat(-0.5f)), e);
  const F32 q = mul(mul(p, t), e);
  return mul(x, select_negative(x, q, sub(splat(1.f), q)));
}

inline F32 silu(F32 x) { return div(x, add(splat(1.f), exponential(sub(splat(0.f), x)))); }

// 0.5 x (1 + tanh u) = x / (1 + e^-2u): no cancellation for negative x.
inline F32 gelu_tanh(F32 x) {
  const F32 cube = mul(mul(x, x), mul(x, splat(0.044715f)));
  return div(x, add(splat(1.f), exponential(mul(add(x, cube), splat(-1.59576912f)))));
}

template <int kActivation>
inline F32 activate(F32 v) {
  if (kActivation == mono_quant::kRelu) return max_keep(splat(0.f), v);
  if (kActivation == mono_quant::kGelu) return gelu(v);
  if (kActivation == mono_quant::kGeluTanh) return gelu_tanh(v);
  if (kActivation == mono_quant::kSilu) return silu(v);
  return v;
}

}  // namespace
