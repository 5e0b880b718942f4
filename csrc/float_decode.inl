// Weights of 4, 8 or 16 bits to float32 lanes: the scratch memory, the next value of a dword, a panel of columns, and
// the groups' scales and zero points. float_linear.inl says what for.

namespace {

using mono_quant::FloatLinearArgs;

constexpr int64_t kChain = 32;
constexpr int64_t kSpan = 4 * kChain;
constexpr int64_t kDecodeDepth = 128;
constexpr int64_t kFloatCols = 2 * kLanes;
constexpr int64_t kDirectRows = 4;
constexpr int64_t kFloatBlockBytes = 512 * 1024;

struct Chain {
  int64_t begin, count, group;
  bool ends_span;
};

// The depth that whole chains fill.
inline int64_t whole_chains(const FloatLinearArgs& p) { return p.k / kChain * kChain; }

// Tiles add the sums of up to four chains of a group before they are scaled, a span (bfloat16_tiles.inl). Whether one ends
// with the chain before input `next`, where its group ends before `group_end` and whole chains at `depth`.
inline bool span_ends(int64_t next, int64_t group_end, int64_t depth) {
  return next % kSpan == 0 || next == group_end || next == depth;
}

// Decoding starts where a dword starts, whatever the number of bits; a group may start within one.
inline int64_t dword_start(int64_t k) { return k / 8 * 8; }

struct FloatScratch {
  float* x;  // converted rows; unused for float32 input
  uint16_t* pairs;  // rows of pairs of bfloat16, where they are met so
  float* total;  // [rows][kFloatCols]
  float* panel;  // [kDecodeDepth][kFloatCols], or half as many rows of pairs of bfloat16
  float* scale;  // [groups][kFloatCols]
  float* zero_point;  // the same
  int64_t bytes;
};

inline int64_t group_count(const FloatLinearArgs& p) { return p.group_size > 0 ? p.k / p.group_size : 1; }

inline int64_t float_block_rows(const FloatLinearArgs& p, int64_t rows) {
  const bool pairs = kPairs && p.dtype == mono_quant::kBFloat16 && p.bits != 16;
  const int64_t fit = kFloatBlockBytes / ((pairs ? 2 : 4) * p.k + 4);
  const int64_t most = mono_quant::smaller(mono_quant::larger(fit, 4 * kFloatRows), pairs ? 384 : 192);
  const int64_t blocks = (rows + most - 1) / most;
  // Even blocks, of whole tiles of either kind.
  const int64_t even = mono_quant::round_up((rows + blocks - 1) / blocks, 32 * kFloatRows);
  return mono_quant::smaller(rows, mono_quant::smaller(even, most));
}

inline int64_t padded_pairs(const FloatLinearArgs& p) { return mono_quant::round_up(p.k, kChain); }

inline FloatScratch carve_float(const FloatLinearArgs& p, int64_t rows, char* base) {
  const int64_t count = float_block_rows(p, rows);
  int64_t at = 0;
  FloatScratch s;
  s.x = (float*)piece(base, &at, p.dtype == mono_quant::kFloat32 ? 0 : count * p.k * 4);
  // Tiles have sixteen rows.
  const int64_t pair_rows = kPairs && p.dtype == mono_quant::kBFloat16 ? mono_quant::round_up(count, 16) : 0;
  s.pairs = (uint16_t*)piece(base, &at, pair_rows * padded_pairs(p) * 2);
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

// What the stored value is more than the code: codes of 8 bits are stored 128 too high.
template <int kBits>
constexpr float kStoredOffset = kBits == 8 ? 128.f : 0.f;

// The next stored value of a dword, which is shifted on to the one after.
template <int kBits>
inline F32 next_stored(I32* t);

template <>
inline F32 next_stored<4>(I32* t) {
  const F32 v = low_nibble(*t);
  *t = shift_right<4>(*t);
  return v;
}

template <>
inline F32 next_stored<8>(I32* t) {
  const F32 v = to_f32(and_i32(*t, splat_i32(255)));
  *t = shift_right<8>(*t);
  return v;
}

template <>
inline F32 next_stored<16>(I32* t) {
  const F32 v = low_half(*t);
  *t = shift_right<16>(*t);
  return v;
}

template <int kBits>
inline F32 next_value(I32* t) {
  const F32 v = next_stored<kBits>(t);
  return kStoredOffset<kBits> == 0 ? v : sub(v, splat(kStoredOffset<kBits>));
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
      for (int64_t i = 0; i < kLanes && g + i < groups; ++i) {
        store_f32(s.scale + (g + i) * kFloatCols + half, bits_to_f32(t[i]));
      }
    }
    if (!p.weight_zero_point) continue;
    for (int64_t g = 0; g < groups; g += 4 * kLanes) {
      I32 t[kLanes];
      load_transposed((const char*)(p.weight_zero_point + first + g), groups, rows, groups - g, t);
      for (int64_t i = 0; i < kLanes && g + i * 4 < groups; ++i) {
        for (int64_t j = 0; j < 4; ++j, t[i] = shift_right<8>(t[i])) {
          store_f32(s.zero_point + (g + i * 4 + j) * kFloatCols + half, to_f32(low_byte(t[i])));
        }
      }
    }
  }
}

}  // namespace
