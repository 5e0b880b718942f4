// Linear layers whose activations stay float: weights in 4 or 8 bits with group scales, or in float16.
//
// A block of 128 inputs x two vectors of columns is decoded to float32 in the first-level cache, then met by all rows
// of the block: never a float copy of more. Few rows are bound by decoding (for 16 int4 values a permutation, a shift, a
// difference where there are zero points, and a multiply-add), many rows by float32 multiply-adds. Measured on one Zen 4
// core with AVX-512 against torch's float32: one row of 4096x4096 3.7 (int4), 2.3 (int8) and 1.6 (float16) times as fast,
// one of 576x1536 5.1, 3.7 and 2.6 times; 128 rows of 768x3072 1.0 to 1.1 times.
//
// Sums run over chains of at most 32 inputs that end where a group ends: part = sum x * code, total += part * scale.
// Tiles add the parts of a span first (float_decode.inl). The order does not depend on the number of rows, so a row's
// result does not either. The unit that includes this file supplies kFloatRows, the rows of a register tile, and kPairs,
// whether it includes bfloat16_linear.inl behind this file.

namespace {

// Only where kPairs: rows of bfloat16 times weights of few bits. False, and nothing is done, where they cannot be met so.
template <int kBits>
bool linear_of_pairs(const FloatLinearArgs& p, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                     void* scratch);
// The rows of a block as pairs; the depth that few rows are done to; and what some chains add to the sums of rows.
template <int kBits>
void pair_rows(const FloatLinearArgs& p, int64_t row, int64_t rows, uint16_t* to);
template <int kBits>
int64_t direct_of_pairs(const FloatLinearArgs& p, int64_t col, int64_t cols, const float* x, int64_t ldx, int64_t rows,
                        const FloatScratch& s);
template <int kBits>
void chains_of_pairs(const FloatLinearArgs& p, int64_t col, int64_t cols, int64_t rows, const Chain* chains,
                     int64_t chain_count, const FloatScratch& s);

template <int kRows>
void float_product(const float* x, int64_t ldx, const Chain* chains, int64_t chain_count, const FloatScratch& s,
                   bool scaled, float* total) {
  F32 sum[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = load_f32(total + r * kFloatCols);
    sum[r][1] = load_f32(total + r * kFloatCols + kLanes);
  }
  const float* w = s.panel + (chains[0].begin - dword_start(chains[0].begin)) * kFloatCols;
  for (int64_t i = 0; i < chain_count; ++i) {
    F32 part[kRows][2];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) part[r][0] = part[r][1] = splat(0.f);
    const float* from = x + chains[i].begin;
    for (int64_t k = 0; k < chains[i].count; ++k, w += kFloatCols) {
      const F32 w0 = load_f32(w), w1 = load_f32(w + kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const F32 v = splat(from[r * ldx + k]);
        part[r][0] = fma(v, w0, part[r][0]);
        part[r][1] = fma(v, w1, part[r][1]);
      }
    }
    if (scaled) {
      const float* scale = s.scale + chains[i].group * kFloatCols;
      const F32 s0 = load_f32(scale), s1 = load_f32(scale + kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        sum[r][0] = fma(part[r][0], s0, sum[r][0]);
        sum[r][1] = fma(part[r][1], s1, sum[r][1]);
      }
    } else {
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        sum[r][0] = add(sum[r][0], part[r][0]);
        sum[r][1] = add(sum[r][1], part[r][1]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    store_f32(total + r * kFloatCols, sum[r][0]);
    store_f32(total + r * kFloatCols + kLanes, sum[r][1]);
  }
}

template <int kRows>
inline void float_rows(int64_t rows, const float* x, int64_t ldx, const Chain* chains, int64_t count,
                       const FloatScratch& s, bool scaled, float* total) {
  if (rows == kRows) return float_product<kRows>(x, ldx, chains, count, s, scaled, total);
  if constexpr (kRows > 1) float_rows<kRows - 1>(rows, x, ldx, chains, count, s, scaled, total);
}

template <int kType>
void store_float_row(const float* total, const float* bias, mono_quant::Activation activation, int64_t cols, void* out,
                     int64_t first) {
  for (int64_t c = 0; c < cols; c += kLanes) {
    const int64_t count = mono_quant::smaller(kLanes, cols - c);
    float b[kLanes] = {0};
    if (bias) memcpy(b, bias + c, (size_t)count * 4);
    const F32 v = activate_by(activation, add(load_f32(total + c), load_f32(b)));
    if (count == kLanes) store_x<kType>(out, first + c, v);
    else store_x_tail<kType>(out, first + c, v, count);
  }
}

// Sums of `rows` rows from `row` on, to columns [col, col + cols).
template <int kType>
void store_float_rows(const FloatLinearArgs& p, const float* total, int64_t row, int64_t rows, int64_t col,
                      int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    store_float_row<kType>(total + r * kFloatCols, p.bias ? p.bias + col : nullptr, p.activation, cols, p.out,
                           (row + r) * p.n + col);
  }
}

template <int kType>
const float* float_x_rows(const FloatLinearArgs& p, int64_t row, int64_t rows, float* to, int64_t* ldx) {
  if (kType == mono_quant::kFloat32) {
    *ldx = p.x_stride;
    return (const float*)p.x + row * p.x_stride;
  }
  *ldx = p.k;
  for (int64_t r = 0; r < rows; ++r) {
    const char* from = (const char*)p.x + (row + r) * p.x_stride * element_size<kType>();
    int64_t i = 0;
    for (; i + kLanes <= p.k; i += kLanes) store_f32(to + r * p.k + i, load_x<kType>(from, i));
    if (i < p.k) {
      float last[kLanes];
      store_f32(last, load_x_tail<kType>(from, i, p.k - i));
      memcpy(to + r * p.k + i, last, (size_t)(p.k - i) * 4);
    }
  }
  return to;
}

template <int kType, int kBits, bool kPaired>
void float_linear_blocks(const FloatLinearArgs& p, int64_t row_begin, int64_t row_end, int64_t col_begin,
                         int64_t col_end, void* scratch) {
  const FloatScratch s = carve_float(p, row_end - row_begin, (char*)scratch);
  const int64_t step = float_block_rows(p, row_end - row_begin), group_size = kBits == 16 ? p.k : p.group_size;
  const int64_t depth = whole_chains(p);
  constexpr bool kScaled = kBits != 16;
  for (int64_t row = row_begin; row < row_end; row += step) {
    const int64_t rows = mono_quant::smaller(step, row_end - row);
    int64_t ldx = 0;
    const float* x = nullptr;
    if (!kPaired || rows <= kDirectRows) x = float_x_rows<kType>(p, row, rows, s.x, &ldx);
    if constexpr (kPaired) pair_rows<kBits>(p, row, rows, s.pairs);
    for (int64_t col = col_begin; col < col_end; col += kFloatCols) {
      const int64_t cols = mono_quant::smaller(kFloatCols, col_end - col);
      memset(s.total, 0, (size_t)(rows * kFloatCols * 4));
      decode_groups(p, col, cols, s);
      int64_t k;
      if constexpr (kPaired) k = direct_of_pairs<kBits>(p, col, cols, x, ldx, rows, s);
      else k = float_direct<kBits, false>(p, col, cols, x, ldx, rows, group_size, s);
      while (k < p.k) {
        // Whole chains, up to the depth of the decoded panel.
        constexpr int64_t kDepth = kPaired ? 2 * kDecodeDepth : kDecodeDepth;
        Chain chains[kDepth / 8];
        int64_t count = 0;
        for (const int64_t k0 = dword_start(k); k < p.k && count < kDepth / 8; ++count) {
          const int64_t in_group = k % group_size;
          const int64_t length = mono_quant::smaller(kChain, group_size - in_group);
          if (k + length - k0 > kDepth) break;
          chains[count] = Chain{k, length, k / group_size, span_ends(k + length, k - in_group + group_size, depth)};
          k += length;
        }
        if constexpr (kPaired) {
          chains_of_pairs<kBits>(p, col, cols, rows, chains, count, s);
          continue;
        }
        decode_panel<kBits>(p, col, cols, chains, count, s);
        for (int64_t r = 0; r < rows; r += kFloatRows) {
          float_rows<kFloatRows>(mono_quant::smaller(kFloatRows, rows - r), x + r * ldx, ldx, chains, count, s, kScaled,
                                 s.total + r * kFloatCols);
        }
      }
      if (kType == p.out_dtype) store_float_rows<kType>(p, s.total, row, rows, col, cols);
      else store_float_rows<mono_quant::kFloat32>(p, s.total, row, rows, col, cols);
    }
  }
}

template <int kType, int kBits>
void float_linear_typed(const FloatLinearArgs& p, int64_t row_begin, int64_t row_end, int64_t col_begin,
                        int64_t col_end, void* scratch) {
  if constexpr (kPairs && kType == mono_quant::kBFloat16 && kBits != 16) {
    if (linear_of_pairs<kBits>(p, row_begin, row_end, col_begin, col_end, scratch)) return;
  }
  float_linear_blocks<kType, kBits, false>(p, row_begin, row_end, col_begin, col_end, scratch);
}

template <int kType>
void float_linear_bits(const FloatLinearArgs& p, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                       void* scratch) {
  if (p.bits == 4) float_linear_typed<kType, 4>(p, row_begin, row_end, col_begin, col_end, scratch);
  else if (p.bits == 8) float_linear_typed<kType, 8>(p, row_begin, row_end, col_begin, col_end, scratch);
  else float_linear_typed<kType, 16>(p, row_begin, row_end, col_begin, col_end, scratch);
}

void float_linear(const FloatLinearArgs& p, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                  void* scratch) {
  if (p.dtype == mono_quant::kFloat32)
    float_linear_bits<mono_quant::kFloat32>(p, row_begin, row_end, col_begin, col_end, scratch);
  else if (p.dtype == mono_quant::kBFloat16)
    float_linear_bits<mono_quant::kBFloat16>(p, row_begin, row_end, col_begin, col_end, scratch);
  else float_linear_bits<mono_quant::kFloat16>(p, row_begin, row_end, col_begin, col_end, scratch);
}

}  // namespace
