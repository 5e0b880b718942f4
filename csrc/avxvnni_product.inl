// Products of u8 code rows with packed s8 panels, and with the rows of a plain weight, by vpdpbusd in 256 bits
// (AVX-VNNI).
//
// 6 rows x 16 columns: twelve sums hide the latency of the instruction, two weights and a broadcast feed them.

namespace {

using Code = uint8_t;
constexpr int64_t kTileRows = 6;
constexpr int64_t kTileCols = 64;
constexpr int64_t kFloatRows = 3;
constexpr bool kPairs = false;
constexpr bool kEvenTiles = true;
constexpr bool kWidePanels = false;
// Code rows of one block stay in the second-level cache beside the weight panels they meet.
constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kBlockRows = 192;
constexpr int64_t kKeptWeights = 1024 * 1024;
constexpr bool kPipelined = false;

inline void begin_product() {}
inline void end_product() {}

inline __m256i broadcast4(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// sum += x * w in place, in the encoding of AVX-VNNI: that of AVX-512 is another instruction set's.
inline void add_products(__m256i* sum, __m256i x, __m256i w) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(*sum) : "x"(x), "x"(w));
}

// kHalves halves of panels, 8 columns each; `steps` groups of 4 in depth.
template <int kRows, int kHalves>
void product(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel_bytes, int64_t steps, int32_t* tile) {
  __m256i acc[kRows][kHalves];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int h = 0; h < kHalves; ++h) acc[r][h] = _mm256_setzero_si256();
  }
  for (int64_t s = 0; s < steps; ++s) {
    __m256i w[kHalves];
#pragma GCC unroll 8
    for (int h = 0; h < kHalves; ++h) {
      const int8_t* from = b + h / 2 * panel_bytes + s * 64 + h % 2 * 32;
      w[h] = _mm256_loadu_si256((const __m256i*)from);
      if (kRows <= 2 && h % 2 == 0) _mm_prefetch((const char*)from + 2048, _MM_HINT_T0);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m256i x = broadcast4(a + r * lda + s * 4);
#pragma GCC unroll 8
      for (int h = 0; h < kHalves; ++h) add_products(&acc[r][h], x, w[h]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int h = 0; h < kHalves; ++h) _mm256_storeu_si256((__m256i*)(tile + r * kTileCols + h * 8), acc[r][h]);
  }
}

// One row reads four panels side by side, since two sums alone would wait for each other.
template <int kRows>
inline void product_rows(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t panel_bytes,
                         int64_t panels, int64_t steps, int32_t* tile) {
  if (rows != kRows) {
    if constexpr (kRows > 1) product_rows<kRows - 1>(a, lda, rows, b, panel_bytes, panels, steps, tile);
    return;
  }
  constexpr int kSide = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  for (; panels >= kSide; panels -= kSide, b += kSide * panel_bytes, tile += kSide * 16) {
    product<kRows, 2 * kSide>(a, lda, b, panel_bytes, steps, tile);
  }
  for (; panels > 0; --panels, b += panel_bytes, tile += 16) product<kRows, 2>(a, lda, b, panel_bytes, steps, tile);
}

void gemm_tile(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t panel_bytes, int64_t panels,
               int64_t depth, int32_t* tile, const int16_t* = nullptr) {
  product_rows<kTileRows>(a, lda, rows, b, panel_bytes, panels, (depth + 3) / 4, tile);
}

// Up to this many rows a row-major weight is read as it is, two of its rows at a time.
constexpr int64_t kPlainRows = 8;

inline int32_t add_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

template <int kRows>
void plain_product(const uint8_t* a, int64_t lda, const int8_t* weight, int64_t k, int64_t columns, int32_t* tile,
                   int32_t* column_sum) {
  const __m256i ones = _mm256_set1_epi8(1);
  const int8_t* row[2] = {weight, weight + (columns > 1 ? k : 0)};
  __m256i sum[kRows][2], total[2];
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    total[c] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r][c] = _mm256_setzero_si256();
  }
  for (int64_t i = 0; i < k; i += 32) {
    __m256i w[2];
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      alignas(32) int8_t last[32] = {0};
      const int8_t* from = row[c] + i;
      if (k - i < 32) from = (const int8_t*)memcpy(last, from, (size_t)(k - i));
      w[c] = _mm256_loadu_si256((const __m256i*)from);
      add_products(&total[c], ones, w[c]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256i x = _mm256_loadu_si256((const __m256i*)(a + r * lda + i));
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) add_products(&sum[r][c], x, w[c]);
    }
  }
  for (int c = 0; c < 2 && c < columns; ++c) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) tile[r * kTileCols + c] = add_lanes(sum[r][c]);
    column_sum[c] = add_lanes(total[c]);
  }
}

void plain_tile(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* weight, int64_t k, int64_t columns,
                int32_t* tile, int32_t* column_sum) {
  for (int64_t c = 0; c < columns; c += 2) {
    const int8_t* from = weight + c * k;
    for (int64_t r = 0; r < rows; r += 4) {
      const uint8_t* x = a + r * lda;
      int32_t* to = tile + r * kTileCols + c;
      switch (rows - r) {
        case 1: plain_product<1>(x, lda, from, k, columns - c, to, column_sum + c); break;
        case 2: plain_product<2>(x, lda, from, k, columns - c, to, column_sum + c); break;
        case 3: plain_product<3>(x, lda, from, k, columns - c, to, column_sum + c); break;
        default: plain_product<4>(x, lda, from, k, columns - c, to, column_sum + c);
      }
    }
  }
}

}  // namespace
