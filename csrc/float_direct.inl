// Weight-only products of few rows: weights streamed once, values from register to multiply-add. Included between
// float_decode.inl and float_linear.inl.

namespace {

// A vector of columns from `weight` on, and where the sums for it go.
struct DirectColumns {
  const char* weight;
  int64_t row_bytes, rows;
  const float *scales, *zero_points;  // [groups], kFloatCols apart
  int64_t group_size, depth;
};

template <int kRows>
struct DirectSums {
  F32 total[kRows];
  F32 span[kRows];  // what is not scaled yet; only where spans are summed
};

// kChains chains from input `k` on, side by side to hide the latency, their values from register to multiply-add.
// With kApart the two halves of pairs of inputs are summed apart, then added, and the chains of a span before they are
// scaled, as tiles do (bfloat16_tiles.inl).
template <int kBits, int kRows, int kChains, bool kZeroPoints, bool kApart>
inline void direct_chains(const DirectColumns& c, const float* x, int64_t ldx, int64_t k, DirectSums<kRows>* sum) {
  constexpr int64_t kPerDword = 32 / kBits, kPerChain = kChain / kPerDword, kDwords = kChains * kPerChain;
  const char* weight = c.weight + k * kBits / 8;
  I32 t[(kDwords + kLanes - 1) / kLanes * kLanes];
  for (int64_t d = 0; d < kDwords; d += kLanes) {
    load_transposed(weight + d * 4, c.row_bytes, c.rows, (kDwords - d) * 4, t + d);
  }
  constexpr int kParts = kApart ? 2 : 1;
  F32 part[kChains][kRows][kParts], zero_point[kChains];
  int64_t group[kChains];
  bool ends_span[kChains];
#pragma GCC unroll 4
  for (int i = 0; i < kChains; ++i) {
    const int64_t at = (k + i * kChain) / c.group_size;
    group[i] = at * kFloatCols;
    ends_span[i] = kApart && span_ends(k + (i + 1) * kChain, (at + 1) * c.group_size, c.depth);
    zero_point[i] = splat(kStoredOffset<kBits>);
    if (kZeroPoints) zero_point[i] = add(zero_point[i], load_f32(c.zero_points + group[i]));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kParts; ++j) part[i][r][j] = splat(0.f);
    }
  }
  x += k;
  for (int64_t d = 0; d < kPerChain; ++d) {
    I32 now[kChains];
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) now[i] = t[i * kPerChain + d];
#pragma GCC unroll 8
    for (int64_t j = 0; j < kPerDword; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        F32 v = next_stored<kBits>(&now[i]);
        if (kZeroPoints || kStoredOffset<kBits> != 0) v = sub(v, zero_point[i]);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          // The halves of pairs: see bfloat16_pairs.inl.
          F32& sum_of = part[i][r][kBits == 4 ? j * kParts / kPerDword : j % kParts];
          sum_of = fma(splat(x[r * ldx + i * kChain + d * kPerDword + j]), v, sum_of);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      F32 &total = sum->total[r], &span = sum->span[r];
      if (kBits == 16) {
        total = add(total, part[i][r][0]);
      } else if (!kApart) {
        total = fma(part[i][r][0], load_f32(c.scales + group[i]), total);
      } else {
        span = add(span, add(part[i][r][0], part[i][r][kParts - 1]));
        if (!ends_span[i]) continue;
        total = fma(span, load_f32(c.scales + group[i]), total);
        span = splat(0.f);
      }
    }
  }
}

// Chains of rows of float32.
template <int kBits, int kRows, bool kZeroPoints, bool kApart>
struct FloatChains {
  // Sums apart are twice as many: as many as there are registers.
  static constexpr int kAtOnce = kApart && kRows > 2 ? 2 : 4;
  const float* x;
  int64_t ldx;
  template <int kChains>
  void add(const DirectColumns& c, int64_t k, DirectSums<kRows>* sum) const {
    direct_chains<kBits, kRows, kChains, kZeroPoints, kApart>(c, x, ldx, k, sum);
  }
};

// Few rows: one vector of columns along all whole chains. Same sums in the same order as those of many rows.
template <int kRows, class Chains>
void product_direct(const DirectColumns& c, const Chains& chains, float* total) {
  // The rows of the next vector of columns are fetched in their order in memory: the rows at hand are read across, as
  // many streams as there are lanes, which no processor foresees. Into the second level: they are a tile away.
  const char* ahead = c.weight + kLanes * c.row_bytes;
  const int64_t depth = c.depth, blocks = mono_quant::larger(1, depth / kSpan);
  const int64_t share = mono_quant::round_up(kLanes * c.row_bytes / blocks, 64);
  DirectSums<kRows> sum;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    sum.total[r] = load_f32(total + r * kFloatCols);
    sum.span[r] = splat(0.f);
  }
  int64_t k = 0;
  for (; k + kSpan <= depth; k += kSpan) {
    for (const char* end = ahead + share; ahead < end; ahead += 64) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += Chains::kAtOnce) chains.template add<Chains::kAtOnce>(c, k + i * kChain, &sum);
  }
  if (k + 2 * kChain <= depth) {
    chains.template add<2>(c, k, &sum);
    k += 2 * kChain;
  }
  if (k < depth) chains.template add<1>(c, k, &sum);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) store_f32(total + r * kFloatCols, sum.total[r]);
}

template <int kBits, bool kZeroPoints, bool kApart>
void float_rows_direct(int64_t rows, const DirectColumns& c, const float* x, int64_t ldx, float* total) {
  if (rows == 1) product_direct<1>(c, FloatChains<kBits, 1, kZeroPoints, kApart>{x, ldx}, total);
  else if (rows == 2) product_direct<2>(c, FloatChains<kBits, 2, kZeroPoints, kApart>{x, ldx}, total);
  else if (rows == 3) product_direct<3>(c, FloatChains<kBits, 3, kZeroPoints, kApart>{x, ldx}, total);
  else product_direct<4>(c, FloatChains<kBits, 4, kZeroPoints, kApart>{x, ldx}, total);
}

// Whether there are few rows, and chains of 32 throughout.
inline bool goes_direct(const FloatLinearArgs& p, int64_t rows, int64_t group_size) {
  return rows <= kDirectRows && (group_size % kChain == 0 || group_size == p.k);
}

// Calls run(columns, sums) for each vector of the columns [col, col + cols); answers the depth that it is to do: all
// whole chains.
template <class Run>
int64_t for_vectors(const FloatLinearArgs& p, int64_t col, int64_t cols, int64_t group_size, const FloatScratch& s,
                    const Run& run) {
  const int64_t depth = whole_chains(p);
  for (int64_t half = 0; half < cols && half < kFloatCols; half += kLanes) {
    run(DirectColumns{(const char*)p.weight + (col + half) * p.row_bytes, p.row_bytes,
                      mono_quant::smaller(kLanes, cols - half), s.scale + half, s.zero_point + half, group_size, depth},
        s.total + half);
  }
  return depth;
}

// The depth done, if any.
template <int kBits, bool kApart>
int64_t float_direct(const FloatLinearArgs& p, int64_t col, int64_t cols, const float* x, int64_t ldx, int64_t rows,
                     int64_t group_size, const FloatScratch& s) {
  if (!goes_direct(p, rows, group_size)) return 0;
  return for_vectors(p, col, cols, group_size, s, [&](const DirectColumns& c, float* total) {
    if (kBits != 16 && p.weight_zero_point) {
      float_rows_direct<kBits, kBits != 16, kApart>(rows, c, x, ldx, total);
    } else {
      float_rows_direct<kBits, false, kApart>(rows, c, x, ldx, total);
    }
  });
}

}  // namespace
