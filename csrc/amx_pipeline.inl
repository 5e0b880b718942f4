// Products of many rows by tiles, with the epilogue of one tile computed between the tile products of the next.
//
// Bound: the tile unit takes 16 cycles for each product of 16 x 64 codes with 64 x 16 weights, 64 cycles for the four
// products of a step in depth. Measured on one core of an Emerald Rapids, a step takes 65 to 66 cycles as long as the code
// rows stay in the first-level cache, whether the weights come from there or from the second: these are used once while
// all weights pass by, and loaded so that they do not push the code rows out (83 cycles a step else, for 1024 inputs). In
// the shadow of the products run, a few rows at a time, the scales, activation and stores of the 32 x 32 sums that were
// finished before, and the fetching of the next weights and inputs into the second-level cache. 32 x 32 sums take some 170
// cycles more to leave the tiles, and 120 to 280 where the lines of the output come from memory: with few inputs, more than
// their products.
// Columns come in the inner loop: each row of the output is then written from left to right, which the processor's own
// prefetching follows. Written in columns first, a large output took a third longer.

namespace {

constexpr int64_t kPairColumns = 32;
constexpr int64_t kPairRows = 32;
// Weights that all rows of a block meet before the next ones come. They stay in the second-level cache.
constexpr int64_t kChunkBytes = 256 * 1024;

// A sum of at most kExactDepth weights as two factors of 16 bits, for 128 and for 1; and what to multiply them with.
inline I32 split_sum(I32 sum) {
  return _mm512_or_si512(_mm512_and_si512(sum, splat_i32(127)), _mm512_slli_epi32(_mm512_srai_epi32(sum, 7), 16));
}
inline I32 minus_zero_point(int32_t zero_point) {
  return splat_i32((int32_t)((uint32_t)(uint16_t)-zero_point | (uint32_t)(-zero_point * 128) << 16));
}

// The sums of a tile whose epilogue is due, and what belongs to its columns.
template <int kType, int kActivation, bool kWeightZeroPoint>
struct Epilogue {
  const int32_t* sums = nullptr;
  char* out = nullptr;
  int64_t stride = 0;  // bytes from one row of the output to the next
  int64_t row = 0, rows = 0;
  const float* x_scale = nullptr;
  const int32_t* x_zero_point = nullptr;
  const int32_t* x_sum = nullptr;
  F32 scale[2], bias[2];
  I32 column_sum[2], zero_point[2];

  void take_columns(const LinearArgs& p, int64_t col) {
    for (int i = 0; i < 2; ++i, col += 16) {
      scale[i] = load_f32(p.weight_scale + col);
      bias[i] = p.bias ? load_f32(p.bias + col) : splat(0.f);
      column_sum[i] = split_sum(load_i32(p.column_sum + col));
      if (kWeightZeroPoint) zero_point[i] = load_i8(p.weight_zero_point + col);
    }
  }

  // The next `count` rows, or what is left.
  inline void advance(int64_t count) {
    const int64_t end = mono_quant::smaller(rows, row + count);
    for (; row < end; ++row) {
      const F32 x = splat(x_scale[row]);
      const I32 minus_zero = minus_zero_point(x_zero_point[row]);
      for (int i = 0; i < 2; ++i) {
        // One instruction where a product of 32 bits and a difference would be three.
        I32 acc = _mm512_dpwssd_epi32(load_i32(sums + row * kPairColumns + i * 16), minus_zero, column_sum[i]);
        if (kWeightZeroPoint) acc = sub_i32(acc, mul_i32(splat_i32(x_sum[row]), zero_point[i]));
        const F32 v = activate<kActivation>(add(mul(mul(to_f32(acc), x), scale[i]), bias[i]));
        store_x<kType>(out + row * stride, i * 16, v);
      }
    }
  }
};

// Lines fetched into the second-level cache while tiles are computed: so many at each step in depth.
struct Ahead {
  const char* next = nullptr;
  const char* end = nullptr;
  int64_t lines = 0;

  Ahead() = default;
  Ahead(const void* from, int64_t bytes, int64_t steps)
      : next((const char*)from), end((const char*)from + bytes), lines((bytes / 64 + steps) / mono_quant::larger(steps, 1)) {}

  inline void step() {
    const char* to = next + lines * 64 < end ? next + lines * 64 : end;
    for (; next < to; next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
};

template <bool kBothRows, typename Pending>
inline void pipelined_tile(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel_bytes, int64_t blocks,
                           int32_t* sums, Pending& pending, Ahead& weights, Ahead& inputs) {
  const uint8_t* a1 = a + 16 * lda;
  const int8_t* b1 = b + panel_bytes;
  const int64_t rows_a_step = (kPairRows + blocks - 1) / blocks;
  TILE_BARRIER();
  TILE_ZERO(0);
  TILE_ZERO(1);
  if (kBothRows) {
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (int64_t i = 0; i < blocks; ++i) {
    TILE_LOAD_ONCE(6, b + i * 1024, 64);
    TILE_LOAD(4, a + i * 64, lda);
    TILE_DPBUSD(0, 4, 6);
    TILE_LOAD_ONCE(7, b1 + i * 1024, 64);
    TILE_DPBUSD(1, 4, 7);
    if (kBothRows) {
      TILE_LOAD(5, a1 + i * 64, lda);
      TILE_DPBUSD(2, 5, 6);
      TILE_DPBUSD(3, 5, 7);
    }
    weights.step();
    inputs.step();
    pending.advance(rows_a_step);
  }
  pending.advance(kPairRows);
  TILE_STORE(0, sums, kPairColumns * 4);
  TILE_STORE(1, sums + 16, kPairColumns * 4);
  if (kBothRows) {
    TILE_STORE(2, sums + 16 * kPairColumns, kPairColumns * 4);
    TILE_STORE(3, sums + 16 * kPairColumns + 16, kPairColumns * 4);
  }
  TILE_BARRIER();
}

template <int kType, int kActivation, bool kWeightZeroPoint>
void pipelined_block(const LinearArgs& p, const RowBlock& block, int64_t col_begin, int64_t col_end) {
  const int64_t row = block.row, rows = block.rows;
  const int64_t kp = mono_quant::round_up(p.k, mono_quant::kPanelDepth), blocks = kp / 64;
  const int64_t panel_bytes = kp * mono_quant::kPanelColumns, tiles = (rows + kPairRows - 1) / kPairRows;
  const int64_t element = element_size<kType>(), stride = p.n * element;
  alignas(64) int32_t sums[2][kPairRows * kPairColumns];
  Epilogue<kType, kActivation, kWeightZeroPoint> pending;
  // The rows of the next block, for whoever quantizes them. The weights are there after the first block, if they fit.
  Ahead inputs;
  if (block.next_rows > 0 && p.x && p.x_stride == p.k) {
    inputs = Ahead((const char*)p.x + (row + rows) * p.k * element, block.next_rows * p.k * element,
                   tiles * (col_end - col_begin) / kPairColumns * blocks);
  }
  const bool fetch_weights = block.first || (col_end - col_begin) * kp > kKeptWeights;
  int which = 0;
  const int64_t chunk = mono_quant::larger(kPairColumns, kChunkBytes / kp / kPairColumns * kPairColumns);
  for (int64_t first = col_begin; first < col_end; first += chunk) {
    const int64_t end = mono_quant::smaller(col_end, first + chunk), after = mono_quant::smaller(col_end, end + chunk);
    const int64_t steps = tiles * (end - first) / kPairColumns * blocks;
    Ahead weights(p.packed + end / 16 * panel_bytes, fetch_weights ? (after - end) / 16 * panel_bytes : 0, steps);
    for (int64_t r = 0; r < rows; r += kPairRows) {
      const int64_t count = mono_quant::smaller(kPairRows, rows - r);
      for (int64_t col = first; col < end; col += kPairColumns) {
        const int8_t* b = p.packed + col / 16 * panel_bytes;
        char* out = (char*)p.out + (row + r) * stride + col * element;
        const uint8_t* from = block.codes + r * kp;
        if (count > 16) pipelined_tile<true>(from, kp, b, panel_bytes, blocks, sums[which], pending, weights, inputs);
        else pipelined_tile<false>(from, kp, b, panel_bytes, blocks, sums[which], pending, weights, inputs);
        pending.take_columns(p, col);
        pending.sums = sums[which];
        pending.out = out;
        pending.stride = stride;
        pending.row = 0;
        pending.rows = count;
        pending.x_scale = block.x_scale + r;
        pending.x_zero_point = block.x_zero_point + r;
        pending.x_sum = block.x_sum + r;
        which ^= 1;
      }
    }
  }
  pending.advance(kPairRows);
}

typedef void (*PipelinedBlock)(const LinearArgs&, const RowBlock&, int64_t, int64_t);

template <int kType, int kActivation>
PipelinedBlock pipelined_for(const LinearArgs& p) {
  return p.weight_zero_point ? pipelined_block<kType, kActivation, true> : pipelined_block<kType, kActivation, false>;
}

template <int kType>
PipelinedBlock pipelined_for(const LinearArgs& p) {
  switch (p.activation) {
    case mono_quant::kRelu: return pipelined_for<kType, mono_quant::kRelu>(p);
    case mono_quant::kGelu: return pipelined_for<kType, mono_quant::kGelu>(p);
    case mono_quant::kGeluTanh: return pipelined_for<kType, mono_quant::kGeluTanh>(p);
    case mono_quant::kSilu: return pipelined_for<kType, mono_quant::kSilu>(p);
    default: return pipelined_for<kType, mono_quant::kNone>(p);
  }
}

// Computes what pairs of whole panels there are in the columns [col_begin, col_end); answers the first column that is
// left.
template <typename Args>
int64_t pipelined_columns(const Args& p, const RowBlock& block, int64_t col_begin, int64_t col_end) {
  const int64_t whole = (col_end - col_begin) / kPairColumns * kPairColumns;
  if (!p.packed || block.rows <= kVnniRows || whole == 0 || p.k == 0) return col_begin;
  PipelinedBlock run = p.dtype == mono_quant::kFloat32    ? pipelined_for<mono_quant::kFloat32>(p)
                         : p.dtype == mono_quant::kBFloat16 ? pipelined_for<mono_quant::kBFloat16>(p)
                                                            : pipelined_for<mono_quant::kFloat16>(p);
  run(p, block, col_begin, col_begin + whole);
  return col_begin + whole;
}

}  // namespace
