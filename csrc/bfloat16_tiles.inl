// Products of bfloat16 pairs by AMX: a tile product takes sixteen rows, 32 inputs (a chain) and sixteen columns. It sums
// the low and the high halves of pairs apart, each pair by pair, adds the two, and adds that to the sums of before: those
// of the chains before it in its span. Few rows are met by multiply-adds in the same order.
//
// Bound: stores. A tile product is 16 cycles long; for each that ends a span sixteen vectors of sums are stored, read,
// scaled and added to totals, which are stored too. Measured on one core of an Emerald Rapids, operands in the first-level
// cache: four products take 228 cycles where every chain is a span, 145 and 106 where two and four chains are. Two cores
// that others used too, 512 rows, 4 bits, groups of 32: 1.9 to 2.4 times as long as torch's bfloat16 linear, which has no
// decoding to do, and 2.7 to 3.7 times as fast as the multiply-adds.

namespace {

// Adds a chain for up to 32 rows and kFloatCols columns to the sums in tiles 0 to 3.
inline void add_pair_tiles(const uint16_t* x, int64_t ldx, bool both, const float* panel) {
  TILE_LOAD(4, x, kChain * 2);
  TILE_LOAD(6, panel, kFloatCols * 4);
  TILE_DPBF16(0, 4, 6);
  TILE_LOAD(7, panel + kLanes, kFloatCols * 4);
  TILE_DPBF16(1, 4, 7);
  if (both) {
    TILE_LOAD(5, x + kPairTileRows * ldx, kChain * 2);
    TILE_DPBF16(2, 5, 6);
    TILE_DPBF16(3, 5, 7);
  }
}

inline void clear_pair_tiles() {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
}

inline void store_pair_tiles(bool both, float* sums) {
  TILE_STORE(0, sums, kFloatCols * 4);
  TILE_STORE(1, sums + kLanes, kFloatCols * 4);
  if (both) {
    TILE_STORE(2, sums + kPairTileRows * kFloatCols, kFloatCols * 4);
    TILE_STORE(3, sums + kPairTileRows * kFloatCols + kLanes, kFloatCols * 4);
  }
}

// Rows are readable up to a multiple of kPairTileRows.
void pair_product(const uint16_t* x, int64_t ldx, int64_t rows, const Chain* chains, int64_t chain_count,
                  const FloatScratch& s, float* total) {
  // The sums of one span are scaled while the next one's are computed.
  alignas(64) float sums[2][2 * kPairTileRows * kFloatCols];
  int which = 0;
  clear_pair_tiles();  // as each span leaves them, and the last chain ends one
  TILE_BARRIER();
  for (int64_t first = 0; first < rows; first += 2 * kPairTileRows) {
    const int64_t count = mono_quant::smaller(2 * kPairTileRows, rows - first);
    const bool both = count > kPairTileRows;
    float* to = total + first * kFloatCols;
    for (int64_t i = 0; i < chain_count; ++i) {
      add_pair_tiles(x + pair_at(first, chains[i].begin, ldx), ldx, both, s.panel + i * (kChain / 2) * kFloatCols);
      if (!chains[i].ends_span) continue;
      store_pair_tiles(both, sums[which]);
      clear_pair_tiles();
      TILE_BARRIER();
      const float* scale = s.scale + chains[i].group * kFloatCols;
      const F32 s0 = load_f32(scale), s1 = load_f32(scale + kLanes);
      for (int64_t r = 0; r < count; ++r) {
        const float* from = sums[which] + r * kFloatCols;
        float* at = to + r * kFloatCols;
        store_f32(at, fma(load_f32(from), s0, load_f32(at)));
        store_f32(at + kLanes, fma(load_f32(from + kLanes), s1, load_f32(at + kLanes)));
      }
      which ^= 1;
    }
  }
}

template <int kBits>
int64_t direct_of_pairs(const FloatLinearArgs& p, int64_t col, int64_t cols, const float* x, int64_t ldx, int64_t rows,
                        const FloatScratch& s) {
  return float_direct<kBits, kApart>(p, col, cols, x, ldx, rows, p.group_size, s);
}

}  // namespace
