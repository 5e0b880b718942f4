// Convolutions from codes to codes as products of tiles: for a block of output pixels the inputs under the kernel are
// gathered into rows, unless the kernel is one pixel and reads the image as it lies; gemm_tile multiplies them.
//
// Bound: the rate of products. Gathering copies each input once for each kernel position that reads it, in the
// second-level cache, against outputs / 4 product instructions for every 64 bytes copied.

namespace {

using mono_quant::ConvArgs;

// Rows of one block stay in the second-level cache beside the weight panels they meet.
constexpr int64_t kGatherBytes = 192 * 1024;

inline int64_t conv_depth(const ConvArgs& p) { return p.kernel_h * p.kernel_w * p.channels; }

// Whether a pixel of the input is a row of the product. Reading past a pixel's end must stay inside the image.
inline bool reads_directly(const ConvArgs& p) {
  const bool in_place = p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0 &&
                        p.out_height == p.height && p.out_width == p.width;
  return sizeof(Code) == 1 && p.kernel_h * p.kernel_w == 1 && in_place && p.channels % kCodesRead == 0;
}

inline int64_t conv_block(const ConvArgs& p, int64_t pixels) {
  const int64_t row = mono_quant::round_up(conv_depth(p), 64) * (int64_t)sizeof(Code);
  int64_t fit = kGatherBytes / row / kTileRows * kTileRows;
  fit = mono_quant::smaller(mono_quant::larger(fit, 2 * kTileRows), 384 / kTileRows * kTileRows);
  return mono_quant::smaller(fit, mono_quant::round_up(pixels, kTileRows));
}

int64_t conv_scratch_bytes(const ConvArgs& p, int64_t pixels) {
  // Behind the last row: copies are of whole vectors.
  return conv_block(p, pixels) * mono_quant::round_up(conv_depth(p), 64) * (int64_t)sizeof(Code) + 64;
}

// Copies `count` codes; may write up to 63 bytes more, and read as many where `end` leaves room.
inline void copy_codes(uint8_t* to, const uint8_t* from, int64_t count, const uint8_t* end) {
  if (from + count + 64 <= end) {
    if (count <= 32) {
      memcpy(to, from, 16);
      if (count > 16) memcpy(to + 16, from + 16, 16);
    } else {
      for (int64_t i = 0; i < count; i += 64) memcpy(to + i, from + i, 64);
    }
  } else {
    memcpy(to, from, (size_t)count);
  }
}
inline void copy_codes(int16_t* to, const uint8_t* from, int64_t count, const uint8_t*) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}
template <typename T>
inline void fill_codes(T* to, uint8_t value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// One output pixel's row whose kernel sticks out of the image.
void gather_edge(const ConvArgs& p, const uint8_t* image, int64_t top, int64_t left, Code* to, const uint8_t* end) {
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t y = top + i * p.dilation_h;
    for (int64_t j = 0; j < p.kernel_w; ++j, to += p.channels) {
      const int64_t x = left + j * p.dilation_w;
      if (y < 0 || y >= p.height || x < 0 || x >= p.width) fill_codes(to, p.x_zero, p.channels);
      else copy_codes(to, image + (y * p.width + x) * p.channels, p.channels, end);
    }
  }
}

// Rows of the product for output pixels [first, first + count), `lda` apart.
void gather(const ConvArgs& p, int64_t first, int64_t count, Code* rows, int64_t lda) {
  const int64_t reach_h = (p.kernel_h - 1) * p.dilation_h, reach_w = (p.kernel_w - 1) * p.dilation_w;
  const int64_t per_image = p.out_height * p.out_width, line = p.kernel_w * p.channels;
  const uint8_t* end = p.x + p.batch * p.height * p.width * p.channels;
  int64_t sample = first / per_image, oy = first % per_image / p.out_width, ox = first % p.out_width;
  for (int64_t r = 0; r < count; ++r, rows += lda) {
    const uint8_t* image = p.x + sample * p.height * p.width * p.channels;
    const int64_t top = oy * p.stride_h - p.pad_h, left = ox * p.stride_w - p.pad_w;
    if (top < 0 || left < 0 || top + reach_h >= p.height || left + reach_w >= p.width) {
      gather_edge(p, image, top, left, rows, end);
    } else {
      const uint8_t* from = image + (top * p.width + left) * p.channels;
      Code* to = rows;
      for (int64_t i = 0; i < p.kernel_h; ++i, from += p.dilation_h * p.width * p.channels) {
        if (p.dilation_w == 1) {
          copy_codes(to, from, line, end);
          to += line;
        } else {
          for (int64_t j = 0; j < p.kernel_w; ++j, to += p.channels) {
            copy_codes(to, from + j * p.dilation_w * p.channels, p.channels, end);
          }
        }
      }
    }
    if (++ox == p.out_width) {
      ox = 0;
      if (++oy == p.out_height) {
        oy = 0;
        ++sample;
      }
    }
  }
}

void conv(const ConvArgs& p, int64_t pixel_begin, int64_t pixel_end, int64_t col_begin, int64_t col_end,
          void* scratch) {
  const int64_t k = conv_depth(p), panel_bytes = mono_quant::round_up(k, 64) * mono_quant::kPanelColumns;
  const int64_t total = p.batch * p.out_height * p.out_width, step = conv_block(p, pixel_end - pixel_begin);
  const FinishRows finish = finish_rows_for(p.finish);
  const bool direct = reads_directly(p);
  alignas(64) int32_t sums[kTileRows * kTileCols];
  begin_product();
  for (int64_t pixel = pixel_begin; pixel < pixel_end; pixel += step) {
    const int64_t rows = mono_quant::smaller(step, pixel_end - pixel);
    const Code* a = (const Code*)scratch;
    int64_t lda = mono_quant::round_up(k, 64);
    if (direct && pixel + mono_quant::round_up(rows, kRowsRead) <= total) {
      a = (const Code*)(p.x + pixel * p.channels);
      lda = p.channels;
    } else {
      gather(p, pixel, rows, (Code*)scratch, lda);
    }
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t col = col_begin; col < col_end; col += kTileCols) {
      const int64_t cols = mono_quant::smaller(kTileCols, col_end - col), panels = (cols + 15) / 16;
      const int8_t* weight = p.weight + col / 16 * panel_bytes;
      for (int64_t i = 0, r = 0; i < tiles; ++i) {
        const int64_t left = rows - r;
        const int64_t count = kEvenTiles ? (left + tiles - i - 1) / (tiles - i) : mono_quant::smaller(left, kTileRows);
        gemm_tile(a + r * lda, lda, count, weight, panel_bytes, panels, k, sums);
        finish(p.finish, sums, kTileCols, pixel + r, count, col, cols);
        r += count;
      }
    }
  }
  end_product();
}

}  // namespace
