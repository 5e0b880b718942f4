// Histograms of float32 values: bin i counts the values in ((i - bins / 2) * width, (i - bins / 2 + 1) * width].
//
// Bound: an increment for each value. Activations repeat (zeros above all), and an increment that follows one of the same
// bin waits for its store: four tables take turns.

namespace {

constexpr int kCountTables = 4;

inline I32 ceil_to_i32(F32 v) {
  const I32 n = round_to_i32(v);
  return add_i32(n, round_to_i32(select_negative(sub(to_f32(n), v), splat(1.f), splat(0.f))));
}

// `tables` holds kCountTables * bins zeros at first; counts are added to them.
void count_values(const float* x, int64_t count, float inverse_width, int64_t bins, uint32_t* tables) {
  const I32 middle = splat_i32((int32_t)(bins / 2 - 1));
  const F32 inverse = splat(inverse_width);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t lanes = mono_quant::smaller(kLanes, count - i);
    int32_t number[kLanes];
    store_i32(number, add_i32(ceil_to_i32(mul(load_some(x + i, lanes), inverse)), middle));
    for (int64_t j = 0; j < lanes; ++j) {
      const int64_t bin = number[j] < 0 ? 0 : number[j] < bins ? number[j] : bins - 1;
      ++tables[(j & (kCountTables - 1)) * bins + bin];
    }
  }
}

}  // namespace
