// Products of bfloat16 pairs by vdpbf16ps, which adds the high halves' product, then the low halves'.
//
// Bound: its rate, 32 products an instruction; decoding comes on top. Measured on two Zen 4 cores, from 128 to 2048 rows
// of 576 to 1536 inputs and 576 to 4096 outputs, groups of 64 with zero points: 0.86 to 1.08 (4 bits) and 0.88 to 0.99
// (8 bits) of the speed of torch's bfloat16 linear, which has no decoding to do; 1.6 to 1.9 times the multiply-adds'. One
// row of 4 bits, weights in the cache: 20 to 29 weights in a nanosecond on one core, multiply-adds 17 to 20.

namespace {

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

// Chains of few rows and weights of 4 bits, whose pairs go from the register to the product.
template <int kRows, bool kZeroPoints>
struct PairChains {
  static constexpr int kAtOnce = 4;
  const uint16_t* x;
  int64_t ldx;
  PairsOfFour<kZeroPoints> pairs;

  template <int kChains>
  void add(const DirectColumns& c, int64_t k, DirectSums<kRows>* sum) const {
    constexpr int64_t kDwords = kChain / 8;
    I32 t[kLanes], offset[kChains];
    load_transposed(c.weight + k / 2, c.row_bytes, c.rows, kChains * kDwords * 4, t);
    F32 part[kChains][kRows];
    int64_t group[kChains];
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      group[i] = (k + i * kChain) / c.group_size * kFloatCols;
      offset[i] = pairs.offset(c.zero_points + group[i]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) part[i][r] = splat(0.f);
    }
    const uint16_t* from = x + k;
    for (int64_t d = 0; d < kDwords; ++d) {
      I32 now[kChains];
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) now[i] = t[i * kDwords + d];
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i) {
          const __m512bh w = (__m512bh)pairs(now[i], offset[i]);
          now[i] = shift_right<4>(now[i]);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            int32_t pair;
            memcpy(&pair, from + r * ldx + i * kChain + d * 8 + j * 2, 4);
            part[i][r] = _mm512_dpbf16_ps(part[i][r], w, (__m512bh)splat_i32(pair));
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        sum->total[r] = fma(part[i][r], load_f32(c.scales + group[i]), sum->total[r]);
      }
    }
  }
};

template <bool kZeroPoints>
void pair_rows_direct(int64_t rows, const DirectColumns& c, const uint16_t* x, int64_t ldx, float* total) {
  if (rows == 1) product_direct<1>(c, PairChains<1, kZeroPoints>{x, ldx, {}}, total);
  else if (rows == 2) product_direct<2>(c, PairChains<2, kZeroPoints>{x, ldx, {}}, total);
  else if (rows == 3) product_direct<3>(c, PairChains<3, kZeroPoints>{x, ldx, {}}, total);
  else product_direct<4>(c, PairChains<4, kZeroPoints>{x, ldx, {}}, total);
}

inline bool zero_points_fit(const FloatLinearArgs& p, const FloatScratch& s) {
  if (!p.weight_zero_point) return true;
  for (int64_t i = 0; i < group_count(p) * kFloatCols; i += kLanes) {
    if (!PairsOfFour<true>::fit(s.zero_point + i)) return false;
  }
  return true;
}

// With 8 bits by multiply-adds, whose operands take fewer instructions than pairs.
template <int kBits>
int64_t direct_of_pairs(const FloatLinearArgs& p, int64_t col, int64_t cols, const float* x, int64_t ldx, int64_t rows,
                        const FloatScratch& s) {
  if (kBits == 8) return float_direct<kBits, kApart>(p, col, cols, x, ldx, rows, p.group_size, s);
  if (!goes_direct(p, rows, p.group_size) || !zero_points_fit(p, s)) return 0;
  const int64_t stride = padded_pairs(p);
  return for_vectors(p, col, cols, p.group_size, s, [&](const DirectColumns& c, float* total) {
    if (p.weight_zero_point) pair_rows_direct<true>(rows, c, s.pairs, stride, total);
    else pair_rows_direct<false>(rows, c, s.pairs, stride, total);
  });
}

}  // namespace
