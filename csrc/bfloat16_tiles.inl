// Products of bfloat16 pairs by AMX: a tile product takes sixteen rows, 32 inputs (a chain) and sixteen columns. It sums
// the low and the high halves of pairs apart, each pair by pair, adds the two, and adds that to the sums of before, here
// zero. Few rows are met by multiply-adds in the same order.
//
// Bound: a tile product is 16 cycles long; beside it sixteen vectors of sums are stored, read, scaled and added. Not timed
// yet; sums and their order are tested on emulated tiles.

namespace {

constexpr int64_t kPairTileRows = 16;

// Sums of a chain for up to 32 rows and kFloatCols columns. Rows past `rows` are read, up to a whole tile.
inline void pair_tiles(const uint16_t* x, int64_t ldx, int64_t rows, const float* panel, float* sums) {
  const bool both = rows > kPairTileRows;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_LOAD(4, x, ldx * 2);
  TILE_LOAD(6, panel, kFloatCols * 4);
  TILE_DPBF16(0, 4, 6);
  TILE_LOAD(7, panel + kLanes, kFloatCols * 4);
  TILE_DPBF16(1, 4, 7);
  if (both) {
    TILE_ZERO(2);
    TILE_ZERO(3);
    TILE_LOAD(5, x + kPairTileRows * ldx, ldx * 2);
    TILE_DPBF16(2, 5, 6);
    TILE_DPBF16(3, 5, 7);
  }
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
  // The sums of one chain are scaled while the next one's are computed.
  alignas(64) float sums[2][2 * kPairTileRows * kFloatCols];
  TILE_BARRIER();
  for (int64_t first = 0; first < rows; first += 2 * kPairTileRows) {
    const int64_t count = mono_quant::smaller(2 * kPairTileRows, rows - first);
    float* to = total + first * kFloatCols;
    for (int64_t i = 0; i < chain_count; ++i) {
      const float* panel = s.panel + i * (kChain / 2) * kFloatCols;
      pair_tiles(x + first * ldx + chains[i].begin, ldx, count, panel, sums[i % 2]);
      TILE_BARRIER();
      const float* scale = s.scale + chains[i].group * kFloatCols;
      const F32 s0 = load_f32(scale), s1 = load_f32(scale + kLanes);
      for (int64_t r = 0; r < count; ++r) {
        const float* from = sums[i % 2] + r * kFloatCols;
        float* at = to + r * kFloatCols;
        store_f32(at, fma(load_f32(from), s0, load_f32(at)));
        store_f32(at + kLanes, fma(load_f32(from + kLanes), s1, load_f32(at + kLanes)));
      }
    }
  }
}

template <int kBits>
int64_t direct_of_pairs(const FloatLinearArgs& p, int64_t col, int64_t cols, const float* x, int64_t ldx, int64_t rows,
                        const FloatScratch& s) {
  return float_direct<kBits, kApart>(p, col, cols, x, ldx, rows, p.group_size, s);
}

}  // namespace
