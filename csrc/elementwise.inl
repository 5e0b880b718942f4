// What a decoder layer does between its products: root-mean-square norms, rotary positions, products and sums of rows.
//
// Bound: reading and writing in the first two levels of cache.

namespace {

// out = v / sqrt(mean(v^2) + eps) * weight with v = x + residual; v goes to `sum` where that is given.
void rms_norm(const mono_quant::RmsNormArgs& p, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* x = p.x + row * p.n;
    const float* residual = p.residual ? p.residual + row * p.n : nullptr;
    float* out = p.out + row * p.n;
    F32 squares = splat(0.f);
    for (int64_t i = 0; i < p.n; i += kLanes) {
      F32 v = load_some(x + i, p.n - i);
      if (residual) v = add(v, load_some(residual + i, p.n - i));
      if (p.sum) store_some(p.sum + row * p.n + i, v, p.n - i);
      store_some(out + i, v, p.n - i);
      squares = fma(v, v, squares);
    }
    const float mean = sum_of_lanes(squares) / (float)p.n;
    const F32 factor = div(splat(1.f), square_root(splat(mean + p.eps)));
    for (int64_t i = 0; i < p.n; i += kLanes) {
      const F32 v = mul(load_some(out + i, p.n - i), factor);
      store_some(out + i, mul(v, load_some(p.weight + i, p.n - i)), p.n - i);
    }
  }
}

// Rotates `heads` heads of `depth` in place: pairs of elements half a head apart, by the angles of one position.
void rotate(float* x, int64_t heads, int64_t depth, const float* cosine, const float* sine) {
  const int64_t half = depth / 2;
  for (int64_t h = 0; h < heads; ++h, x += depth) {
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t count = half - i;
      const F32 a = load_some(x + i, count), b = load_some(x + half + i, count);
      const F32 first = sub(mul(a, load_some(cosine + i, count)), mul(b, load_some(sine + i, count)));
      const F32 second = add(mul(b, load_some(cosine + half + i, count)), mul(a, load_some(sine + half + i, count)));
      store_some(x + i, first, count);
      store_some(x + half + i, second, count);
    }
  }
}

void multiply_rows(float* x, const float* by, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_some(x + i, mul(load_some(x + i, count - i), load_some(by + i, count - i)), count - i);
  }
}

void add_rows(const float* a, const float* b, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_some(out + i, add(load_some(a + i, count - i), load_some(b + i, count - i)), count - i);
  }
}

void widen_row(const void* from, mono_quant::DType dtype, float* to, int64_t count) {
  if (dtype == mono_quant::kFloat32) widen_typed<mono_quant::kFloat32>(from, to, count);
  else if (dtype == mono_quant::kBFloat16) widen_typed<mono_quant::kBFloat16>(from, to, count);
  else widen_typed<mono_quant::kFloat16>(from, to, count);
}

void narrow_row(const float* from, void* to, mono_quant::DType dtype, int64_t count) {
  if (dtype == mono_quant::kFloat32) narrow_typed<mono_quant::kFloat32>(from, to, count);
  else if (dtype == mono_quant::kBFloat16) narrow_typed<mono_quant::kBFloat16>(from, to, count);
  else narrow_typed<mono_quant::kFloat16>(from, to, count);
}

}  // namespace
