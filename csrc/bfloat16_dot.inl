// Products of bfloat16 pairs by vdpbf16ps, which adds the high halves' product, then the low halves'.
//
// Bound: its rate, 32 products an instruction; decoding comes on top. Measured on two Zen 4 cores, from 128 to 2048 rows
// of 576 to 1536 inputs and 576 to 4096 outputs, groups of 64 with zero points: 0.86 to 0.92 (4 bits) and 0.80 to 0.90
// (8 bits) of the speed of torch's bfloat16 linear, which has no decoding to do; 1.6 to 1.9 times the multiply-adds'.

namespace {

constexpr bool kEvenBesideOdd = false;
constexpr bool kPairFirstHigh = true;

inline void begin_product() {}
inline void end_product() {}

template <int kRows>
void dot_rows(const uint16_t* x, int64_t ldx, const Chain* chains, int64_t chain_count, const FloatScratch& s,
              float* total) {
  F32 sum[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = load_f32(total + r * kFloatCols);
    sum[r][1] = load_f32(total + r * kFloatCols + kLanes);
  }
  const int32_t* w = (const int32_t*)s.panel;
  for (int64_t i = 0; i < chain_count; ++i) {
    F32 part[kRows][2];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) part[r][0] = part[r][1] = splat(0.f);
    const uint16_t* from = x + chains[i].begin;
    for (int64_t k = 0; k < kChain; k += 2, w += kFloatCols) {
      const __m512bh w0 = (__m512bh)load_i32(w), w1 = (__m512bh)load_i32(w + kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        memcpy(&pair, from + r * ldx + k, 4);
        const __m512bh v = (__m512bh)splat_i32(pair);
        part[r][0] = _mm512_dpbf16_ps(part[r][0], v, w0);
        part[r][1] = _mm512_dpbf16_ps(part[r][1], v, w1);
      }
    }
    const float* scale = s.scale + chains[i].group * kFloatCols;
    const F32 s0 = load_f32(scale), s1 = load_f32(scale + kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = fma(part[r][0], s0, sum[r][0]);
      sum[r][1] = fma(part[r][1], s1, sum[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    store_f32(total + r * kFloatCols, sum[r][0]);
    store_f32(total + r * kFloatCols + kLanes, sum[r][1]);
  }
}

template <int kRows>
inline void dot_last_rows(int64_t rows, const uint16_t* x, int64_t ldx, const Chain* chains, int64_t count,
                          const FloatScratch& s, float* total) {
  if (rows == kRows) return dot_rows<kRows>(x, ldx, chains, count, s, total);
  if constexpr (kRows > 1) dot_last_rows<kRows - 1>(rows, x, ldx, chains, count, s, total);
}

void pair_product(const uint16_t* x, int64_t ldx, int64_t rows, const Chain* chains, int64_t chain_count,
                  const FloatScratch& s, float* total) {
  for (int64_t r = 0; r < rows; r += kFloatRows) {
    dot_last_rows<kFloatRows>(mono_quant::smaller(kFloatRows, rows - r), x + r * ldx, ldx, chains, chain_count, s,
                              total + r * kFloatCols);
  }
}

}  // namespace
