// The dynamic int8 linear: blocking, epilogue and store. The unit that includes this file supplies, before:
//   Code                  element of the code rows its product reads (uint8_t, or int16_t without a u8 x s8 product)
//   kTileRows, kTileCols  the largest tile of gemm_tile; kTileCols is 16 or 64
//   kEvenTiles            whether rows are split into tiles of even height
//   kWidePanels           whether products of several tiles read panels that were widened to 16 bits before
//   gemm_tile(...)        int32 products of a tile
//   pack_panel(...)       one 16-column panel from a row-major weight, and its column sums
//   kPlainRows            up to this many rows a row-major weight is met by plain_tile(...) without packing
//   kBlockBytes, kBlockRows  how many code rows are taken at once, at most; kBlockRows is a multiple of kTileRows
//   kKeptWeights          bytes of weights that stay in the cache from one block of rows to the next
//   kPipelined            whether pipelined_columns(...) computes whole panels, products and epilogue interleaved

namespace {

using mono_quant::Activation;
using mono_quant::DType;
using mono_quant::LinearArgs;

// An int32 sum of products of u8 codes and (s8 - s8) codes cannot overflow up to this depth: 255 * 255 * 32768 < 2^31.
constexpr int64_t kExactDepth = 32768;

// Rows whose codes are ready.
struct RowBlock {
  int64_t row, rows;
  int64_t next_rows;  // of the block that will be quantized after this one
  bool first;  // of the rows that this thread computes
  const uint8_t* codes;
  const float* x_scale;
  const int32_t* x_zero_point;
  const int32_t* x_sum;
};

// Only where kPipelined: computes what it can of the columns, and answers the first that is left.
template <typename Args>
int64_t pipelined_columns(const Args& p, const RowBlock& block, int64_t col_begin, int64_t col_end);

// What belongs to the columns of a tile: kTileCols readable elements each.
struct Columns {
  const float* scale;
  const float* bias;
  const int32_t* sum;
  const int8_t* zero_point;  // null without
};

// Where fewer columns are left, or there is no array, a padded one stands in.
struct ColumnStore {
  alignas(64) float scale[64];
  alignas(64) float bias[64];
  alignas(64) int32_t sum[64];
  alignas(64) int8_t zero_point[64];
};

struct Tile {
  const int32_t* sums;  // kTileCols apart; float32 values in the bits when `converted`
  bool converted;
  int64_t rows, cols;
  const float* x_scale;
  const int32_t* x_zero_point;
  const int32_t* x_sum;  // sum over k of (code - zero point); read only with weight zero points
  const Columns* columns;
  void* out;
  int64_t first;  // element of `out` where the tile starts
  int64_t stride;
};

template <int kType>
inline void store_lanes(const Tile& t, int64_t at, int64_t lanes, F32 v) {
  if (lanes == kLanes) store_x<kType>(t.out, at, v);
  else store_x_tail<kType>(t.out, at, v, lanes);
}

// Column by column, so that what belongs to the columns stays in registers.
template <int kType, int kActivation>
void finish_tile(const Tile& tile) {
  const Tile t = tile;  // a copy that stores through `out` cannot be suspected to change
  const Columns columns = *t.columns;
  for (int64_t c = 0; c < t.cols; c += kLanes) {
    const int64_t lanes = mono_quant::smaller(kLanes, t.cols - c);
    const F32 scale = load_f32(columns.scale + c), bias = load_f32(columns.bias + c);
    const I32 column_sum = load_i32(columns.sum + c);
    const I32 zero_point = columns.zero_point ? load_i8(columns.zero_point + c) : splat_i32(0);
    for (int64_t r = 0; r < t.rows; ++r) {
      const int32_t* sums = t.sums + r * kTileCols + c;
      F32 v;
      if (t.converted) {
        v = load_f32((const float*)sums);
      } else {
        I32 acc = sub_i32(load_i32(sums), mul_i32(splat_i32(t.x_zero_point[r]), column_sum));
        if (columns.zero_point) acc = sub_i32(acc, mul_i32(splat_i32(t.x_sum[r]), zero_point));
        v = to_f32(acc);
      }
      v = add(mul(mul(v, splat(t.x_scale[r])), scale), bias);
      store_lanes<kType>(t, t.first + r * t.stride + c, lanes, activate<kActivation>(v));
    }
  }
}

typedef void (*FinishTile)(const Tile&);

template <int kType>
FinishTile finish_for(Activation activation) {
  switch (activation) {
    case mono_quant::kRelu: return finish_tile<kType, mono_quant::kRelu>;
    case mono_quant::kGelu: return finish_tile<kType, mono_quant::kGelu>;
    case mono_quant::kGeluTanh: return finish_tile<kType, mono_quant::kGeluTanh>;
    case mono_quant::kSilu: return finish_tile<kType, mono_quant::kSilu>;
    default: return finish_tile<kType, mono_quant::kNone>;
  }
}

FinishTile finish_for(DType dtype, Activation activation) {
  if (dtype == mono_quant::kFloat32) return finish_for<mono_quant::kFloat32>(activation);
  if (dtype == mono_quant::kBFloat16) return finish_for<mono_quant::kBFloat16>(activation);
  return finish_for<mono_quant::kFloat16>(activation);
}

inline int64_t padded_depth(int64_t k) { return mono_quant::round_up(k, mono_quant::kPanelDepth); }

// How many rows are quantized at once.
inline int64_t block_rows(const LinearArgs& p, int64_t rows) {
  const int64_t kp = padded_depth(p.k);
  int64_t bytes = (kp + 1) * (int64_t)sizeof(Code);
  if (kPipelined && p.n * kp <= kKeptWeights) {
    // The inputs of the next block wait in the cache too.
    bytes += p.k * element_size(p.dtype);
  }
  const int64_t fit = mono_quant::larger(kBlockBytes / bytes / kTileRows * kTileRows, kTileRows);
  return mono_quant::smaller(mono_quant::smaller(fit, kBlockRows), mono_quant::round_up(rows, kTileRows));
}

struct Scratch {
  uint8_t* codes;
  Code* wide;
  float* scale;
  int32_t* zero_point;
  int32_t* sum;
  int8_t* panels;
  int16_t* wide_panels;
  int64_t bytes;
};

inline Scratch carve(const LinearArgs& p, int64_t rows, char* base) {
  const int64_t kp = padded_depth(p.k), count = block_rows(p, rows);
  int64_t at = 0;
  Scratch s;
  s.codes = (uint8_t*)piece(base, &at, count * kp);
  s.wide = (Code*)piece(base, &at, sizeof(Code) > 1 ? count * kp * (int64_t)sizeof(Code) : 0);
  s.scale = (float*)piece(base, &at, count * 4);
  s.zero_point = (int32_t*)piece(base, &at, count * 4);
  s.sum = (int32_t*)piece(base, &at, count * 4);
  s.panels = (int8_t*)piece(base, &at, p.plain ? kTileCols * kp : 0);
  s.wide_panels = (int16_t*)piece(base, &at, kWidePanels ? kTileCols * kp * 2 : 0);
  s.bytes = at;
  return s;
}

int64_t linear_scratch_bytes(const LinearArgs& p, int64_t rows) { return carve(p, rows, nullptr).bytes; }

inline int64_t code_sum(const uint8_t* codes, int64_t k) {
  int64_t sum = 0;
  for (int64_t i = 0; i < k; i += 4096) {
    int32_t part = 0;
    const int64_t end = mono_quant::smaller(k, i + 4096);
    for (int64_t j = i; j < end; ++j) part += codes[j];
    sum += part;
  }
  return sum;
}

inline Columns columns_at(const LinearArgs& p, int64_t col, int64_t cols, ColumnStore* store) {
  Columns c = {p.weight_scale + col, p.bias ? p.bias + col : store->bias,
               p.column_sum ? p.column_sum + col : store->sum,
               p.weight_zero_point ? p.weight_zero_point + col : nullptr};
  if (!p.bias) memset(store->bias, 0, sizeof(store->bias));
  if (cols < kTileCols) {
    const size_t count = (size_t)cols;
    memset(store->scale, 0, sizeof(store->scale));
    memcpy(store->scale, c.scale, count * 4);
    c.scale = store->scale;
    if (p.bias) {
      memset(store->bias, 0, sizeof(store->bias));
      memcpy(store->bias, c.bias, count * 4);
      c.bias = store->bias;
    }
    if (p.column_sum) {
      memset(store->sum, 0, sizeof(store->sum));
      memcpy(store->sum, c.sum, count * 4);
      c.sum = store->sum;
    }
    if (p.weight_zero_point) {
      memset(store->zero_point, 0, sizeof(store->zero_point));
      memcpy(store->zero_point, c.zero_point, count);
      c.zero_point = store->zero_point;
    }
  }
  return c;
}

// Beyond kExactDepth: int32 sums of pieces of the depth, added in int64; float32 only once, at the end.
void deep_tile(const LinearArgs& p, const Code* a, int64_t kp, int64_t rows, const int8_t* panels, int64_t panel_count,
               const uint8_t* codes, const int32_t* x_zero_point, const Columns& c, int32_t* tile) {
  int64_t total[kTileRows * kTileCols];
  for (int64_t i = 0; i < rows * kTileCols; ++i) total[i] = 0;
  for (int64_t k0 = 0; k0 < p.k; k0 += kExactDepth) {
    const int64_t depth = mono_quant::smaller(kExactDepth, p.k - k0);
    gemm_tile(a + k0, kp, rows, panels + k0 * mono_quant::kPanelColumns, kp * mono_quant::kPanelColumns, panel_count,
              depth, tile);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < panel_count * 16; ++i) total[r * kTileCols + i] += tile[r * kTileCols + i];
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t zx = x_zero_point[r];
    const int64_t centred = p.weight_zero_point ? code_sum(codes + r * kp, p.k) - p.k * zx : 0;
    for (int64_t i = 0; i < panel_count * 16; ++i) {
      const int64_t zw = c.zero_point ? c.zero_point[i] : 0;
      const float exact = (float)(total[r * kTileCols + i] - zx * c.sum[i] - centred * zw);
      memcpy(tile + r * kTileCols + i, &exact, 4);
    }
  }
}

void linear_block(const LinearArgs& p, int64_t row, int64_t rows, int64_t col_begin, int64_t col_end, const Scratch& s,
                  const Code* a, const uint8_t* codes, const float* scale, const int32_t* zero_point,
                  FinishTile finish) {
  const int64_t kp = padded_depth(p.k), panel_bytes = kp * mono_quant::kPanelColumns;
  const bool deep = p.k > kExactDepth, direct = p.plain && !deep && rows <= kPlainRows;
  alignas(64) int32_t sums[kTileRows * kTileCols];
  ColumnStore store;
  for (int64_t col = col_begin; col < col_end; col += kTileCols) {
    const int64_t cols = mono_quant::smaller(kTileCols, col_end - col);
    const int64_t panel_count = (cols + 15) / 16;
    const int8_t* panels = s.panels;
    const Columns columns = columns_at(p, col, cols, &store);
    if (p.packed) {
      panels = p.packed + col / 16 * panel_bytes;
    } else if (!direct) {
      for (int64_t i = 0; i < panel_count; ++i) {
        pack_panel(p.plain, p.n, p.k, col / 16 + i, s.panels + i * panel_bytes, store.sum + i * 16);
      }
    }
    const bool wide = kWidePanels && rows > 2 * kTileRows && !direct && !deep;
    if (wide) {
      for (int64_t i = 0; i < panel_count * panel_bytes; ++i) s.wide_panels[i] = panels[i];
    }
    // Even tiles: 8 rows as 4 + 4 keep more of the product units busy than 6 + 2.
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t i = 0, r = 0; i < tiles; ++i) {
      const int64_t left = rows - r;
      const int64_t count = kEvenTiles ? (left + tiles - i - 1) / (tiles - i) : mono_quant::smaller(left, kTileRows);
      // The lines of the output arrive while the product runs; the stores would otherwise wait for them.
      for (int64_t j = 0; j < count; ++j) {
        const char* to = (const char*)p.out + ((row + r + j) * p.n + col) * element_size(p.dtype);
        for (int64_t b = 0; b < cols * element_size(p.dtype); b += 64) __builtin_prefetch(to + b, 1);
      }
      if (direct) {
        plain_tile(a + r * kp, kp, count, p.plain + col * p.k, p.k, cols, sums, store.sum);
      } else if (deep) {
        deep_tile(p, a + r * kp, kp, count, panels, panel_count, codes + r * kp, zero_point + r, columns, sums);
      } else {
        gemm_tile(a + r * kp, kp, count, panels, panel_bytes, panel_count, p.k, sums, wide ? s.wide_panels : nullptr);
      }
      Tile t;
      t.sums = sums;
      t.converted = deep;
      t.rows = count;
      t.cols = cols;
      t.x_scale = scale + r;
      t.x_zero_point = zero_point + r;
      t.x_sum = s.sum + r;
      t.columns = &columns;
      t.out = p.out;
      t.first = (row + r) * p.n + col;
      t.stride = p.n;
      finish(t);
      r += count;
    }
  }
}

inline const Code* code_rows(const uint8_t* codes, int64_t, Code*, const uint8_t*) { return (const Code*)codes; }
inline const Code* code_rows(const uint8_t* codes, int64_t count, int16_t* wide, const int16_t*) {
  for (int64_t i = 0; i < count; ++i) wide[i] = codes[i];
  return (const Code*)wide;
}

void pack_weight(const int8_t* weight, int64_t n, int64_t k, int64_t panel_begin, int64_t panel_end, int8_t* packed) {
  const int64_t panel_bytes = padded_depth(k) * mono_quant::kPanelColumns;
  int32_t sum[16];
  for (int64_t p = panel_begin; p < panel_end; ++p) pack_panel(weight, n, k, p, packed + p * panel_bytes, sum);
}

void linear(const LinearArgs& p, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
            void* scratch) {
  const int64_t kp = padded_depth(p.k), step = block_rows(p, row_end - row_begin);
  const Scratch s = carve(p, row_end - row_begin, (char*)scratch);
  const FinishTile finish = finish_for(p.dtype, p.activation);
  begin_product();
  for (int64_t row = row_begin; row < row_end; row += step) {
    const int64_t rows = mono_quant::smaller(step, row_end - row);
    const uint8_t* codes = s.codes;
    const float* scale = s.scale;
    const int32_t* zero_point = s.zero_point;
    if (p.codes) {
      codes = p.codes + row * kp;
      scale = p.x_scale + row;
      zero_point = p.x_zero_point + row;
    } else {
      quantize_rows((const char*)p.x + row * p.x_stride * element_size(p.dtype), p.dtype, p.x_stride, rows, p.k,
                    s.codes, kp, s.scale, s.zero_point);
    }
    if (p.weight_zero_point && p.k <= kExactDepth) {
      for (int64_t r = 0; r < rows; ++r) s.sum[r] = (int32_t)(code_sum(codes + r * kp, p.k) - p.k * zero_point[r]);
    }
    const Code* a = code_rows(codes, rows * kp, (Code*)s.wide, (const Code*)nullptr);
    int64_t col = col_begin;
    if constexpr (kPipelined) {
      if (p.k <= kExactDepth) {
        const int64_t next_rows = mono_quant::smaller(step, row_end - row - rows);
        const RowBlock block = {row, rows, next_rows, row == row_begin, codes, scale, zero_point, s.sum};
        col = pipelined_columns(p, block, col, col_end);
      }
    }
    linear_block(p, row, rows, col, col_end, s, a, codes, scale, zero_point, finish);
  }
  end_product();
}

}  // namespace
