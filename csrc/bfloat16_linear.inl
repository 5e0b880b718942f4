// Linear layers of rows of bfloat16 in units that multiply pairs (bfloat16_pairs.inl says what of).
//
// The file that is included before this one supplies:
//   begin_product(), end_product()  what the units want around products
//   pair_product(...)     the sums of whole chains for some rows and kFloatCols columns
//   direct_of_pairs(...)  those of few rows

namespace {

// The units are ready as long as this lives.
class PairUnits {
 public:
  PairUnits() : control_(_mm_getcsr()) {
    _mm_setcsr(control_ | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
    begin_product();
  }
  ~PairUnits() {
    end_product();
    _mm_setcsr(control_);
  }
  PairUnits(const PairUnits&) = delete;
  PairUnits& operator=(const PairUnits&) = delete;

 private:
  const unsigned control_;
};

// What pair_product must answer for two chains of inputs `x` and the codes `w` of some columns: with scales of one, the
// sums of both, or of a span of both.
inline F32 expected_sum(const float* x, const F32* w) {
  F32 total = splat(0.f);
  for (int64_t first = 0; first < 2 * kChain; first += kChain) {
    F32 sum[2] = {splat(0.f), splat(0.f)};
    for (int64_t k = first; k < first + kChain; ++k) {
      F32& part = sum[kApart && k % 2];
      part = fma(splat(x[k]), w[k], part);
    }
    total = add(total, kApart ? add(sum[0], sum[1]) : sum[0]);
  }
  return total;
}

// Tries on numbers whether this processor sums in the order that its manual gives.
bool sums_in_order() {
  constexpr int64_t kRows = 8, kDepth = 2 * kChain;
  alignas(64) uint16_t pairs[kPairTileRows * kDepth] = {0};
  alignas(64) float panel[kDepth / 2 * kFloatCols], total[kPairTileRows * kFloatCols] = {0}, ones[kFloatCols];
  float x[kRows][kDepth];
  F32 w[2][kDepth];
  uint32_t random = 1;
  const auto next = [&random] { return (random = random * 1664525u + 1013904223u) >> 8; };
  for (int64_t c = 0; c < kFloatCols; ++c) ones[c] = 1.f;
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t k = 0; k < kDepth; ++k) {
      // Any sign and fraction, exponents over a range of 64.
      const uint32_t bits = (next() & 0x807fu) | (96 + next() % 64) << 7;
      pairs[pair_at(r, k / kChain * kChain, kDepth) + (kPairFirstHigh ? k ^ 1 : k) % kChain] = (uint16_t)bits;
      const uint32_t word = bits << 16;
      memcpy(&x[r][k], &word, 4);
    }
  }
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t k = 0; k < kDepth; ++k) {
      float codes[kLanes];
      for (float& code : codes) code = (float)(next() % 511) - 255.f;
      w[half][k] = load_f32(codes);
      if (k % 2 == 0) continue;
      store_i32((int32_t*)panel + k / 2 * kFloatCols + half * kLanes, pair_of(w[half][k - 1], w[half][k]));
    }
  }
  FloatScratch s = {};
  s.panel = panel;
  s.scale = ones;
  const Chain chains[2] = {{0, kChain, 0, false}, {kChain, kChain, 0, true}};
  pair_product(pairs, kDepth, kRows, chains, 2, s, total);
  bool same = true;
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t half = 0; half < 2; ++half) {
      float want[kLanes];
      store_f32(want, expected_sum(x[r], w[half]));
      same = same && memcmp(want, total + r * kFloatCols + half * kLanes, sizeof(want)) == 0;
    }
  }
  return same;
}

// Groups that whole chains fill. The processor is asked once; threads that ask at the same time get the same answer.
bool pairs_fit(const FloatLinearArgs& p) {
  static int8_t in_order = -1;
  if (p.group_size % kChain != 0 && p.group_size != p.k) return false;
  int8_t known = __atomic_load_n(&in_order, __ATOMIC_RELAXED);
  if (known < 0) {
    known = sums_in_order();
    __atomic_store_n(&in_order, known, __ATOMIC_RELAXED);
  }
  return known > 0;
}

template <int kBits>
bool linear_of_pairs(const FloatLinearArgs& p, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                     void* scratch) {
  const PairUnits units;
  if (!pairs_fit(p)) return false;
  float_linear_blocks<mono_quant::kBFloat16, kBits, true>(p, row_begin, row_end, col_begin, col_end, scratch);
  return true;
}

template <int kBits>
void chains_of_pairs(const FloatLinearArgs& p, int64_t col, int64_t cols, int64_t rows, const Chain* chains,
                     int64_t chain_count, const FloatScratch& s) {
  decode_pairs<kBits>(p, col, cols, chains, chain_count, s);
  pair_product(s.pairs, padded_pairs(p), rows, chains, chain_count, s, s.total);
}

}  // namespace
