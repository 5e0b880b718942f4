// Rows of bfloat16 times weights of 4 or 8 bits in units that multiply pairs of bfloat16: for AVX-512 only.
//
// A code less its zero point has at most eight significant bits, so bfloat16 holds it, and its product with a bfloat16
// input is exact in float32: what is left to round are the sums, and their order is known. Few rows are met in that order
// too, so that a row's result does not depend on the number of rows: by the units themselves, or by multiply-adds of
// float32 (float_direct.inl). The units treat denormal numbers as zeros; PairUnits has the multiply-adds do so too.
//
// With 8 bits a pair is two inputs side by side; with 4 bits it is two of eight, four apart, whose codes are the low bits
// of the halves of one dword.
//
// The unit that includes this file supplies, before:
//   kApart          how a chain is summed: the halves of the pairs apart, then added; else pair by pair
//   kPairFirstHigh  with 8 bits, whether the first input of a pair is in the high half of its dword
//   kPairTiles      whether sixteen rows lie together, chain by chain
// bfloat16_dot.inl and bfloat16_tiles.inl multiply, bfloat16_linear.inl brings it together.

namespace {

// Two vectors of float32 that bfloat16 holds, as the halves of dwords.
inline I32 halves_of(F32 low, F32 high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high));
}

inline I32 pair_of(F32 first, F32 second) {
  return kPairFirstHigh ? halves_of(second, first) : halves_of(first, second);
}

// Pairs of 4-bit codes less their zero points, from the low four bits of each half of a dword.
template <bool kZeroPoints>
class PairsOfFour {
 public:
  // The numbers from -15 on; or, without zero points, those from -8 to 7 twice: what stands above the four bits chooses.
  PairsOfFour() {
    const F32 even = kZeroPoints ? _mm512_setr_ps(-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15)
                                 : _mm512_setr_ps(-8, -6, -4, -2, 0, 2, 4, 6, -8, -6, -4, -2, 0, 2, 4, 6);
    numbers_ = halves_of(even, add(even, splat(1.f)));
  }
  // Zero points may be any 8-bit number; whether those of some columns are such that four bits could hold.
  static bool fit(const float* zero_points) {
    const F32 v = load_f32(zero_points);
    return !(_mm512_cmp_ps_mask(v, splat(-8.f), _CMP_LT_OQ) | _mm512_cmp_ps_mask(v, splat(7.f), _CMP_GT_OQ));
  }
  // What is to be added to the stored four bits of some columns, for both halves.
  static I32 offset(const float* zero_points) {
    if (!kZeroPoints) return splat_i32(0);
    const I32 v = sub_i32(splat_i32(7), round_to_i32(load_f32(zero_points)));
    return _mm512_or_si512(v, shift_left<16>(v));
  }
  I32 operator()(I32 dwords, I32 offset) const {
    if (kZeroPoints) dwords = _mm512_add_epi16(and_i32(dwords, splat_i32(0x000f000f)), offset);
    return _mm512_permutexvar_epi16(dwords, numbers_);
  }

 private:
  I32 numbers_;
};

constexpr int64_t kPairTileRows = 16;

// The element where input `k` of a row is, the first of a chain, in rows of `stride` elements.
inline int64_t pair_at(int64_t row, int64_t k, int64_t stride) {
  if (!kPairTiles) return row * stride + k;
  return (row / kPairTileRows * stride + k) * kPairTileRows + row % kPairTileRows * kChain;
}

// Rows of bfloat16 as pairs, with zeros behind the last input; the stride in elements is padded_pairs(p).
template <int kBits>
void pair_rows(const FloatLinearArgs& p, int64_t row, int64_t rows, uint16_t* to) {
  const int64_t stride = padded_pairs(p);
  const __m512i fours_apart =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t* from = (const uint16_t*)p.x + (row + r) * p.x_stride;
    for (int64_t i = 0; i < stride; i += kChain) {
      const int64_t left = p.k - i;
      __m512i v = _mm512_maskz_loadu_epi16(left >= kChain ? ~0u : (1u << left) - 1, from + i);
      if (kBits == 4) v = _mm512_shuffle_epi8(v, fours_apart);
      else if (kPairFirstHigh) v = _mm512_rol_epi32(v, 16);
      _mm512_storeu_si512(to + pair_at(r, i, stride), v);
    }
  }
}

// The pairs of a chain in kPerDword dwords of 4 or 8 bits, to the rows of a panel. Behind the last input of a chain there
// is some number: the inputs there are zeros.
inline void decode_chain_of_fours(const I32* dwords, const PairsOfFour<true>& pairs, I32 offset, int32_t* to) {
  for (int64_t d = 0; d < kChain / 8; ++d) {
    I32 now = dwords[d];
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j, to += kFloatCols, now = shift_right<4>(now)) store_i32(to, pairs(now, offset));
  }
}

// The same for zero points that do not fit.
inline void decode_chain_of_far_fours(const I32* dwords, F32 zero_point, int32_t* to) {
  for (int64_t d = 0; d < kChain / 8; ++d) {
    I32 now = dwords[d];
    for (int64_t j = 0; j < 4; ++j, to += kFloatCols, now = shift_right<4>(now)) {
      const F32 low = sub(low_nibble(now), zero_point), high = sub(low_nibble(shift_right<16>(now)), zero_point);
      store_i32(to, halves_of(low, high));
    }
  }
}

inline void decode_chain_of_bytes(const I32* dwords, F32 zero_point, int32_t* to) {
  for (int64_t d = 0; d < kChain / 4; ++d) {
    I32 now = dwords[d];
#pragma GCC unroll 2
    for (int64_t j = 0; j < 2; ++j, to += kFloatCols) {
      const F32 first = sub(next_stored<8>(&now), zero_point);
      store_i32(to, pair_of(first, sub(next_stored<8>(&now), zero_point)));
    }
  }
}

// Codes of columns [col, col + kFloatCols) and of the chains' inputs, less the zero points, as panel[pair][column].
template <int kBits>
void decode_pairs(const FloatLinearArgs& p, int64_t col, int64_t cols, const Chain* chains, int64_t chain_count,
                  const FloatScratch& s) {
  // The dwords of one load hold several chains.
  constexpr int64_t kDwords = kChain * kBits / 32, kAtOnce = kLanes / kDwords;
  const PairsOfFour<true> pairs;
  for (int64_t half = 0; half < kFloatCols; half += kLanes) {
    const int64_t rows = mono_quant::larger(0, cols - half);
    I32 t[kLanes];
    for (int64_t i = 0; i < chain_count; ++i) {
      if (i % kAtOnce == 0) {
        const int64_t first_byte = chains[i].begin * kBits / 8;
        const char* from = (const char*)p.weight + (rows > 0 ? (col + half) * p.row_bytes + first_byte : 0);
        load_transposed(from, p.row_bytes, rows, mono_quant::smaller(p.row_bytes - first_byte, kLanes * 4), t);
      }
      const F32 none = splat(0.f);
      alignas(64) float zero_points[kLanes];
      store_f32(zero_points, p.weight_zero_point ? load_f32(s.zero_point + chains[i].group * kFloatCols + half) : none);
      int32_t* to = (int32_t*)s.panel + i * (kChain / 2) * kFloatCols + half;
      const I32* dwords = t + i % kAtOnce * kDwords;
      if (kBits == 4 && pairs.fit(zero_points)) decode_chain_of_fours(dwords, pairs, pairs.offset(zero_points), to);
      else if (kBits == 4) decode_chain_of_far_fours(dwords, load_f32(zero_points), to);
      else decode_chain_of_bytes(dwords, add(load_f32(zero_points), splat(kStoredOffset<8>)), to);
    }
  }
}

}  // namespace
