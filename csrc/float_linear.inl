// Linear layers whose activations stay float: weights in 4 or 8 bits with group scales, or in float16.
//
// A block of 128 inputs x two vectors of columns is decoded to float32 in the first-level cache, then met by all rows of
// the block: never a float copy of more. Few rows are bound by decoding (a shift, a permutation and a multiply-add for 16
// int4 values), many rows by float32 multiply-adds. Measured on one Zen 4 core with AVX-512 against torch's float32: one
// row of 4096x4096 2.9 (int4), 2.2 (int8) and 1.6 (float16) times as fast; 128 rows of 768x3072 1.5 to 1.6 times.
//
// Sums run over chains of at most 32 inputs that end where a group ends: part = sum x * code, total += part * scale.
// The order does not depend on the number of rows, so a row's result does not either. The unit that includes this file
// supplies kFloatRows, the rows of a register tile.

namespace {

using mono_quant::FloatLinearArgs;

constexpr int64_t kChain = 32;
constexpr int64_t kDecodeDepth = 128;
constexpr int64_t kFloatCols = 2 * kLanes;
constexpr int64_t kDirectRows = 4;
constexpr int64_t kPrefetchBytes = 256;
constexpr int64_t kFloatBlockBytes = 512 * 1024;

struct Chain {
  int64_t begin, count, group;
};

// Decoding starts where a dword starts, whatever the number of bits; a group may start within one.
inline int64_t dword_start(int64_t k) { return k / 8 * 8; }

struct FloatScratch {
  float* x;  // converted rows; unused for float32 input
  float* total;  // [rows][kFloatCols]
  float* panel;  // [kDecodeDepth][kFloatCols]
  float* scale;  // [groups][kFloatCols]
  float* zero_point;  // the same
  int64_t bytes;
};

inline int64_t group_count(const FloatLinearArgs& p) { return p.group_size > 0 ? p.k / p.group_size : 1; }

inline int64_t float_block_rows(const FloatLinearArgs& p, int64_t rows) {
  const int64_t fit = kFloatBlockBytes / (4 * p.k + 4);
  return mono_quant::smaller(rows, mono_quant::smaller(mono_quant::larger(fit, 4 * kFloatRows), 192));
}

inline FloatScratch carve_float(const FloatLinearArgs& p, int64_t rows, char* base) {
  const int64_t count = float_block_rows(p, rows);
  int64_t at = 0;
  FloatScratch s;
  s.x = (float*)piece(base, &at, p.dtype == mono_quant::kFloat32 ? 0 : count * p.k * 4);
  s.total = (float*)piece(base, &at, count * kFloatCols * 4);
  s.panel = (float*)piece(base, &at, kDecodeDepth * kFloatCols * 4);
  // Decoding zero points fills whole groups of four rows.
  const int64_t groups = mono_quant::round_up(group_count(p), kLanes * 4);
  s.scale = (float*)piece(base, &at, p.bits == 16 ? 0 : groups * kFloatCols * 4);
  s.zero_point = (float*)piece(base, &at, p.weight_zero_point ? groups * kFloatCols * 4 : 0);
  s.bytes = at;
  return s;
}

int64_t float_linear_scratch_bytes(const FloatLinearArgs& p, int64_t rows) { return carve_float(p, rows, nullptr).bytes; }

// The next value of a dword of codes; the dword is shifted on to the one after.
template <int kBits>
inline F32 next_value(I32* t);

template <>
inline F32 next_value<4>(I32* t) {
  const F32 v = low_nibble(*t);
  *t = shift_right<4>(*t);
  return v;
}

// The codes are stored 128 too high: flipping the byte's top bit makes them signed.
template <>
inline F32 next_value<8>(I32* t) {
  const F32 v = to_f32(low_byte(exclusive_or(*t, splat_i32(0x80))));
  *t = shift_right<8>(*t);
  return v;
}

template <>
inline F32 next_value<16>(I32* t) {
  const F32 v = low_half(*t);
  *t = shift_right<16>(*t);
  return v;
}

// Codes of columns [col, col + kFloatCols) and of the chains' inputs, less the zero points, as panel[k][column] from
// the start of the first dword on.
template <int kBits>
void decode_panel(const FloatLinearArgs& p, int64_t col, int64_t cols, const Chain* chains, int64_t chain_count,
                  const FloatScratch& s) {
  constexpr int64_t kPerDword = 32 / kBits, kPerLoad = kPerDword * kLanes;
  const int64_t k0 = dword_start(chains[0].begin);
  const int64_t end = chains[chain_count - 1].begin + chains[chain_count - 1].count;
  const int64_t depth = end - k0;
  for (int64_t half = 0; half < kFloatCols; half += kLanes) {
    const int64_t rows = mono_quant::larger(0, cols - half);
    for (int64_t k = 0; k < depth; k += kPerLoad) {
      const int64_t first_byte = (k0 + k) * kBits / 8;
      const char* from = (const char*)p.weight + (rows > 0 ? (col + half) * p.row_bytes + first_byte : 0);
      const int64_t count = mono_quant::smaller(kPerLoad, depth - k);
      const int64_t dwords = (count + kPerDword - 1) / kPerDword;
      I32 t[kLanes];
      load_transposed(from, p.row_bytes, rows, mono_quant::smaller(p.row_bytes - first_byte, kLanes * 4), t);
      for (int64_t d = 0; d < dwords; ++d) {
        float* to = s.panel + (k + d * kPerDword) * kFloatCols + half;
#pragma GCC unroll 8
        for (int64_t i = 0; i < kPerDword; ++i) store_f32(to + i * kFloatCols, next_value<kBits>(&t[d]));
      }
    }
  }
  if (p.weight_zero_point) {
    for (int64_t i = 0; i < chain_count; ++i) {
      const float* zero_point = s.zero_point + chains[i].group * kFloatCols;
      float* row = s.panel + (chains[i].begin - k0) * kFloatCols;
      const F32 z0 = load_f32(zero_point), z1 = load_f32(zero_point + kLanes);
      for (int64_t k = 0; k < chains[i].count; ++k, row += kFloatCols) {
        store_f32(row, sub(load_f32(row), z0));
        store_f32(row + kLanes, sub(load_f32(row + kLanes), z1));
      }
    }
  }
}

// Group scales and zero points of the columns as [group][column].
void decode_groups(const FloatLinearArgs& p, int64_t col, int64_t cols, const FloatScratch& s) {
  if (p.bits == 16) return;
  const int64_t groups = group_count(p);
  for (int64_t half = 0; half < kFloatCols; half += kLanes) {
    const int64_t rows = mono_quant::larger(0, cols - half), first = rows > 0 ? (col + half) * groups : 0;
    for (int64_t g = 0; g < groups; g += kLanes) {
      I32 t[kLanes];
      load_transposed((const char*)(p.weight_scale + first + g), groups * 4, rows, (groups - g) * 4, t);
      for (int64_t i = 0; i < kLanes; ++i) store_f32(s.scale + (g + i) * kFloatCols + half, bits_to_f32(t[i]));
    }
    if (!p.weight_zero_point) continue;
    for (int64_t g = 0; g < groups; g += 4 * kLanes) {
      I32 t[kLanes];
      load_transposed((const char*)(p.weight_zero_point + first + g), groups, rows, groups - g, t);
      for (int64_t i = 0; i < kLanes; ++i) {
        for (int64_t j = 0; j < 4; ++j, t[i] = shift_right<8>(t[i])) {
          store_f32(s.zero_point + (g + i * 4 + j) * kFloatCols + half, to_f32(low_byte(t[i])));
        }
      }
    }
  }
}

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

template <int kRows>
inline void float_rows(int64_t rows, const float* x, int64_t ldx, const Chain* chains, int64_t count,
                       const FloatScratch& s, bool scaled, float* total) {
  if (rows == kRows) return float_product<kRows>(x, ldx, chains, count, s, scaled, total);
  if constexpr (kRows > 1) float_rows<kRows - 1>(rows, x, ldx, chains, count, s, scaled, total);
}

template <int kType>
void store_float_row(const float* total, const float* bias, int64_t cols, void* out, int64_t first) {
  for (int64_t c = 0; c < cols; c += kLanes) {
    const int64_t count = mono_quant::smaller(kLanes, cols - c);
    float b[kLanes] = {0};
    if (bias) memcpy(b, bias + c, (size_t)count * 4);
    const F32 v = add(load_f32(total + c), load_f32(b));
    if (count == kLanes) {
      store_x<kType>(out, first + c, v);
    } else {
      alignas(64) char last[kLanes * 4];
      store_x<kType>(last, 0, v);
      memcpy((char*)out + (first + c) * element_size<kType>(), last, (size_t)(count * element_size<kType>()));
    }
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

template <int kType, int kBits>
void float_linear_typed(const FloatLinearArgs& p, int64_t row_begin, int64_t row_end, int64_t col_begin,
                        int64_t col_end, void* scratch) {
  const FloatScratch s = carve_float(p, row_end - row_begin, (char*)scratch);
  const int64_t step = float_block_rows(p, row_end - row_begin), group_size = kBits == 16 ? p.k : p.group_size;
  constexpr bool kScaled = kBits != 16;
  for (int64_t row = row_begin; row < row_end; row += step) {
    const int64_t rows = mono_quant::smaller(step, row_end - row);
    int64_t ldx;
    const float* x = float_x_rows<kType>(p, row, rows, s.x, &ldx);
    for (int64_t col = col_begin; col < col_end; col += kFloatCols) {
      const int64_t cols = mono_quant::smaller(kFloatCols, col_end - col);
      memset(s.total, 0, (size_t)(rows * kFloatCols * 4));
      decode_groups(p, col, cols, s);
      for (int64_t k = float_direct<kBits>(p, col, cols, x, ldx, rows, group_size, s); k < p.k;) {
        // Whole chains, up to the depth of the decoded panel.
        Chain chains[kDecodeDepth / 8];
        int64_t count = 0;
        for (const int64_t k0 = dword_start(k); k < p.k && count < kDecodeDepth / 8; ++count) {
          const int64_t in_group = k % group_size;
          const int64_t length = mono_quant::smaller(kChain, group_size - in_group);
          if (k + length - k0 > kDecodeDepth) break;
          chains[count] = Chain{k, length, k / group_size};
          k += length;
        }
        decode_panel<kBits>(p, col, cols, chains, count, s);
        for (int64_t r = 0; r < rows; r += kFloatRows) {
          float_rows<kFloatRows>(mono_quant::smaller(kFloatRows, rows - r), x + r * ldx, ldx, chains, count, s, kScaled,
                                 s.total + r * kFloatCols);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        store_float_row<kType>(s.total + r * kFloatCols, p.bias ? p.bias + col : nullptr, cols, p.out,
                               (row + r) * p.n + col);
      }
    }
  }
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
  if (p.dtype == mono_quant::kFloat32) float_linear_bits<mono_quant::kFloat32>(p, row_begin, row_end, col_begin, col_end, scratch);
  else if (p.dtype == mono_quant::kBFloat16) float_linear_bits<mono_quant::kBFloat16>(p, row_begin, row_end, col_begin, col_end, scratch);
  else float_linear_bits<mono_quant::kFloat16>(p, row_begin, row_end, col_begin, col_end, scratch);
}

}  // namespace
