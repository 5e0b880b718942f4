// Rows of bfloat16 times weights of 4 or 8 bits in units that multiply pairs of bfloat16: for AVX-512 only.
//
// A code less its zero point has at most eight significant bits, so bfloat16 holds it, and its product with a bfloat16
// input is exact in float32: what is left to round are the sums, and their order is known. That order is kept for few
// rows too, which are met by multiply-adds of float32 (float_direct.inl), so that a row's result does not depend on the
// number of rows. The units treat denormal numbers as zeros; PairUnits has the multiply-adds do so too.
//
// The unit that includes this file supplies, before:
//   kEvenBesideOdd        how a chain is summed: even and odd inputs apart, then added; else input by input
//   kPairFirstHigh        whether the first input of a pair is in the high half of its dword
//   pair_product(...)     the sums of whole chains for some rows and kFloatCols columns

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

// Two vectors of float32 that bfloat16 holds, side by side as pairs.
inline I32 pair_of(F32 first, F32 second) {
  const __m512i high = _mm512_castps_si512(kPairFirstHigh ? first : second);
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(kPairFirstHigh ? second : first), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, high);
}

// Rows of bfloat16 as pairs, with zeros behind the last input; the stride in elements is padded_pairs(p).
template <int kBits>
void pair_rows(const FloatLinearArgs& p, int64_t row, int64_t rows, uint16_t* to) {
  const int64_t stride = padded_pairs(p);
  for (int64_t r = 0; r < rows; ++r, to += stride) {
    const uint16_t* from = (const uint16_t*)p.x + (row + r) * p.x_stride;
    for (int64_t i = 0; i < stride; i += 32) {
      const int64_t left = p.k - i;
      __m512i v = _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : (1u << left) - 1, from + i);
      if (kPairFirstHigh) v = _mm512_rol_epi32(v, 16);
      _mm512_storeu_si512(to + i, v);
    }
  }
}

// Codes of columns [col, col + kFloatCols) and of the chains' inputs, less the zero points, as panel[pair][column].
// Chains are kChain inputs long, but for the last, which is filled up with zeros.
template <int kBits>
void decode_pairs(const FloatLinearArgs& p, int64_t col, int64_t cols, const Chain* chains, int64_t chain_count,
                  const FloatScratch& s) {
  // The dwords of one load hold several chains.
  constexpr int64_t kPerDword = 32 / kBits, kDwords = kChain / kPerDword, kAtOnce = kLanes / kDwords;
  for (int64_t half = 0; half < kFloatCols; half += kLanes) {
    const int64_t rows = mono_quant::larger(0, cols - half);
    I32 t[kLanes];
    for (int64_t i = 0; i < chain_count; ++i) {
      if (i % kAtOnce == 0) {
        const int64_t first_byte = chains[i].begin * kBits / 8;
        const char* from = (const char*)p.weight + (rows > 0 ? (col + half) * p.row_bytes + first_byte : 0);
        load_transposed(from, p.row_bytes, rows, mono_quant::smaller(p.row_bytes - first_byte, kLanes * 4), t);
      }
      const F32 offset = splat(kStoredOffset<kBits>);
      const float* zero_points = s.zero_point + chains[i].group * kFloatCols + half;
      const F32 zero_point = p.weight_zero_point ? add(offset, load_f32(zero_points)) : offset;
      int32_t* to = (int32_t*)s.panel + i * (kChain / 2) * kFloatCols + half;
      for (int64_t d = 0; d < kDwords; ++d) {
        I32 now = t[i % kAtOnce * kDwords + d];
#pragma GCC unroll 4
        for (int64_t j = 0; j < kPerDword; j += 2, to += kFloatCols) {
          const F32 first = sub(next_stored<kBits>(&now), zero_point);
          const F32 second = sub(next_stored<kBits>(&now), zero_point);
          const int64_t left = chains[i].count - d * kPerDword - j;
          const F32 none = splat(0.f);
          store_i32(to, pair_of(left > 0 ? first : none, left > 1 ? second : none));
        }
      }
    }
  }
}

// What pair_product must answer for a chain of inputs `x` and the codes `w` of some columns.
inline F32 expected_sum(const float* x, const F32* w) {
  F32 sum[2] = {splat(0.f), splat(0.f)};
  for (int64_t k = 0; k < kChain; ++k) {
    F32& part = sum[kEvenBesideOdd && k % 2];
    part = fma(splat(x[k]), w[k], part);
  }
  return kEvenBesideOdd ? add(sum[0], sum[1]) : sum[0];
}

// Tries on numbers whether this processor sums in the order that its manual gives.
bool sums_in_order() {
  constexpr int64_t kRows = 8;
  alignas(64) uint16_t pairs[16 * kChain] = {0};
  alignas(64) float panel[kChain / 2 * kFloatCols], total[16 * kFloatCols] = {0}, ones[kFloatCols];
  float x[kRows][kChain];
  F32 w[2][kChain];
  uint32_t random = 1;
  const auto next = [&random] { return (random = random * 1664525u + 1013904223u) >> 8; };
  for (int64_t c = 0; c < kFloatCols; ++c) ones[c] = 1.f;
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t k = 0; k < kChain; ++k) {
      // Any sign and fraction, exponents over a range of 64.
      const uint32_t bits = (next() & 0x807fu) | (96 + next() % 64) << 7;
      pairs[r * kChain + (kPairFirstHigh ? k ^ 1 : k)] = (uint16_t)bits;
      const uint32_t word = bits << 16;
      memcpy(&x[r][k], &word, 4);
    }
  }
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t k = 0; k < kChain; ++k) {
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
  const Chain chain = {0, kChain, 0};
  pair_product(pairs, kChain, kRows, &chain, 1, s, total);
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
  float_linear_blocks<mono_quant::kBFloat16, kBits, true, kEvenBesideOdd>(p, row_begin, row_end, col_begin, col_end,
                                                                          scratch);
  return true;
}

template <int kBits>
void chains_of_pairs(const FloatLinearArgs& p, int64_t col, int64_t cols, int64_t rows, const Chain* chains,
                     int64_t chain_count, const FloatScratch& s) {
  decode_pairs<kBits>(p, col, cols, chains, chain_count, s);
  pair_product(s.pairs, padded_pairs(p), rows, chains, chain_count, s, s.total);
}

}  // namespace
