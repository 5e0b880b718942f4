// GELU, exact and tanh, for any number of lanes.

namespace {

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

// 0.5 x (1 + tanh u) = x / (1 + e^-2u): no cancellation for negative x.
inline F32 gelu_tanh(F32 x) {
  const F32 cube = mul(mul(x, x), mul(x, splat(0.044715f)));
  return div(x, add(splat(1.f), exponential(mul(add(x, cube), splat(-1.59576912f)))));
}

}  // namespace
