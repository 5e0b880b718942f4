// Layer normalization of a sum: (x + residual) with mean 0 and variance 1 over each row, scaled and shifted.
//
// Bound: three passes over a row in the first-level cache.

namespace {

void add_norm(const mono_quant::NormArgs& p, int64_t row_begin, int64_t row_end) {
  const float inverse_n = 1.f / (float)p.n;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* x = p.x + row * p.n;
    const float* residual = p.residual + row * p.n;
    float* out = p.out + row * p.n;
    F32 sum = splat(0.f);
    for (int64_t i = 0; i < p.n; i += kLanes) {
      const F32 v = add(load_some(x + i, p.n - i), load_some(residual + i, p.n - i));
      store_some(out + i, v, p.n - i);
      sum = add(sum, v);
    }
    const float mean = sum_of_lanes(sum) * inverse_n;
    F32 squares = splat(0.f);
    int64_t i = 0;
    for (; i + kLanes <= p.n; i += kLanes) {
      const F32 v = sub(load_f32(out + i), splat(mean));
      squares = fma(v, v, squares);
    }
    float variance = sum_of_lanes(squares);
    for (; i < p.n; ++i) variance += (out[i] - mean) * (out[i] - mean);
    const F32 factor = div(splat(1.f), square_root(splat(variance * inverse_n + p.eps)));
    for (i = 0; i < p.n; i += kLanes) {
      const F32 v = mul(sub(load_some(out + i, p.n - i), splat(mean)), factor);
      store_some(out + i, add(mul(v, load_some(p.weight + i, p.n - i)), load_some(p.bias + i, p.n - i)), p.n - i);
    }
  }
}

}  // namespace
