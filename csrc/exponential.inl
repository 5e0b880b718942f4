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

inline F32 silu(F32 x) { return div(x, add(splat(1.f), exponential(sub(splat(0.f), x)))); }

}  // namespace
