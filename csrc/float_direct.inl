// Weight-only products of few rows: weights streamed once, values from register to multiply-add. Included between
// float_decode.inl and float_linear.inl.

namespace {

// Few rows: values go from register to multiply-add without passing through the panel, four chains side by side to hide
// the latency, one vector of columns along all whole blocks of the depth so that each weight row is read as a stream.
// Same sums in the same order as float_product.
template <int kBits, int kRows>
void float_product_direct(const FloatLinearArgs& p, int64_t col, int64_t cols, int64_t half, const float* x,
                          int64_t ldx, int64_t group_size, int64_t blocks, const FloatScratch& s, float* total) {
  constexpr int64_t kPerDword = 32 / kBits, kPerChain = kChain / kPerDword, kBlockBytes = kDecodeDepth * kBits / 8;
  const int64_t rows = mono_quant::smaller(kLanes, cols - half), row_bytes = p.row_bytes;
  const char* weight = (const char*)p.weight + (col + half) * row_bytes;
  const float* scales = s.scale + half;
  const float* zero_points = p.weight_zero_point ? s.zero_point + half : nullptr;
  F32 sum[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r] = load_f32(total + r * kFloatCols + half);
  for (int64_t block = 0; block < blocks; ++block, weight += kBlockBytes, x += kDecodeDepth) {
    I32 t[4 * kPerChain];
    // Every row is a stream of its own, too many for the processor to foresee. Into the second level only: rows whose
    // length is a power of two fall into few sets of the first.
    for (int64_t r = 0; r < rows; ++r) {
      const char* ahead = weight + r * row_bytes + kPrefetchBytes;
      for (int64_t b = 0; b < kBlockBytes; b += 64) __builtin_prefetch(ahead + b, 0, 2);
    }
    for (int64_t d = 0; d < 4 * kPerChain; d += kLanes) {
      load_transposed(weight + d * 4, row_bytes, rows, kBlockBytes - d * 4, t + d);
    }
    F32 part[4][kRows], zero_point[4];
    int64_t group[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      group[i] = (block * kDecodeDepth + i * kChain) / group_size * kFloatCols;
      zero_point[i] = zero_points ? load_f32(zero_points + group[i]) : splat(0.f);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) part[i][r] = splat(0.f);
    }
    for (int64_t d = 0; d < kPerChain; ++d) {
      I32 now[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) now[i] = t[i * kPerChain + d];
#pragma GCC unroll 8
      for (int64_t j = 0; j < kPerDword; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          F32 v = next_value<kBits>(&now[i]);
          if (kBits != 16 && zero_points) v = sub(v, zero_point[i]);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            part[i][r] = fma(splat(x[r * ldx + i * kChain + d * kPerDword + j]), v, part[i][r]);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        sum[r] = kBits == 16 ? add(sum[r], part[i][r]) : fma(part[i][r], load_f32(scales + group[i]), sum[r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) store_f32(total + r * kFloatCols + half, sum[r]);
}

// The depth done: all whole blocks, if there are few rows and chains of 32 throughout; else nothing.
template <int kBits>
int64_t float_direct(const FloatLinearArgs& p, int64_t col, int64_t cols, const float* x, int64_t ldx, int64_t rows,
                     int64_t group_size, const FloatScratch& s) {
  if (rows > kDirectRows || (group_size % kChain != 0 && group_size != p.k)) return 0;
  const int64_t blocks = p.k / kDecodeDepth;
  for (int64_t half = 0; half < cols && half < kFloatCols; half += kLanes) {
    if (rows == 1) float_product_direct<kBits, 1>(p, col, cols, half, x, ldx, group_size, blocks, s, s.total);
    else if (rows == 2) float_product_direct<kBits, 2>(p, col, cols, half, x, ldx, group_size, blocks, s, s.total);
    else if (rows == 3) float_product_direct<kBits, 3>(p, col, cols, half, x, ldx, group_size, blocks, s, s.total);
    else float_product_direct<kBits, 4>(p, col, cols, half, x, ldx, group_size, blocks, s, s.total);
  }
  return blocks * kDecodeDepth;
}

}  // namespace
