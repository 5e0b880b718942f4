// Products of u8 code rows, widened to 16 bits, with packed s8 panels by vpmaddwd.
//
// 16 products per instruction and an addition for each. Where several tiles of rows meet a panel, it is widened once,
// before them.

namespace {

using Code = int16_t;
constexpr int64_t kTileRows = 6;
constexpr int64_t kTileCols = 16;
constexpr int64_t kFloatRows = 3;
constexpr bool kPairs = false;
constexpr bool kEvenTiles = true;
constexpr bool kWidePanels = true;
// Code rows of one block stay in the second-level cache beside the weight panels they meet.
constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kBlockRows = 192;
constexpr int64_t kKeptWeights = 1024 * 1024;
constexpr bool kPipelined = false;

inline void begin_product() {}
inline void end_product() {}

// sums += x * w for four inputs and eight columns. Twelve sums, two weights and two temporaries are all sixteen
// registers: left to itself, gcc copies sums and spills them.
inline void add_products(const int16_t* x, __m256i low, __m256i high, __m256i* sum_low, __m256i* sum_high) {
  __m256i four, product;
  __asm__("vpbroadcastq %6, %2\n\t"
          "vpmaddwd %4, %2, %3\n\t"
          "vpaddd %3, %0, %0\n\t"
          "vpmaddwd %5, %2, %3\n\t"
          "vpaddd %3, %1, %1"
          : "+x"(*sum_low), "+x"(*sum_high), "=&x"(four), "=&x"(product)
          : "x"(low), "x"(high), "m"(*(const int64_t(*)[1])x));
}

inline __m256i load_weights(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
inline __m256i load_weights(const int16_t* p) { return _mm256_loadu_si256((const __m256i*)p); }

// Eight columns: every accumulator holds two partial sums for each of four.
template <int kRows, typename Weight>
void product(const int16_t* a, int64_t lda, const Weight* b, int64_t steps, int32_t* tile) {
  __m256i acc[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  for (int64_t s = 0; s < steps; ++s) {
    const __m256i low = load_weights(b + s * 64), high = load_weights(b + s * 64 + 16);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) add_products(a + r * lda + s * 4, low, high, &acc[r][0], &acc[r][1]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    const __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[r][0], acc[r][1]), 0xd8);
    _mm256_storeu_si256((__m256i*)(tile + r * kTileCols), sums);
  }
}

template <int kRows, typename Weight>
inline void product_rows(const int16_t* a, int64_t lda, int64_t rows, const Weight* b, int64_t steps, int32_t* tile) {
  if (rows == kRows) {
    product<kRows>(a, lda, b, steps, tile);
    product<kRows>(a, lda, b + 32, steps, tile + 8);
  } else if constexpr (kRows > 1) {
    product_rows<kRows - 1>(a, lda, rows, b, steps, tile);
  }
}

void gemm_tile(const int16_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t, int64_t, int64_t depth,
               int32_t* tile, const int16_t* wide = nullptr) {
  const int64_t steps = (depth + 3) / 4;
  if (wide) product_rows<kTileRows>(a, lda, rows, wide, steps, tile);
  else product_rows<kTileRows>(a, lda, rows, b, steps, tile);
}

// Up to this many rows a row-major weight is read as it is: widened, multiplied, and summed for the zero points.
constexpr int64_t kPlainRows = 4;

inline int32_t add_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

template <int kRows>
void plain_product(const int16_t* a, int64_t lda, const int8_t* weight, int64_t k, int32_t* tile, int32_t* column_sum) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[kRows], total = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r] = _mm256_setzero_si256();
  for (int64_t i = 0; i < k; i += 16) {
    alignas(16) int8_t last[16] = {0};
    const int8_t* from = weight + i;
    if (k - i < 16) from = (const int8_t*)memcpy(last, from, (size_t)(k - i));
    const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
    total = _mm256_add_epi32(total, _mm256_madd_epi16(w, ones));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256i x = _mm256_loadu_si256((const __m256i*)(a + r * lda + i));
      sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(x, w));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) tile[r * kTileCols] = add_lanes(sum[r]);
  *column_sum = add_lanes(total);
}

void plain_tile(const int16_t* a, int64_t lda, int64_t rows, const int8_t* weight, int64_t k, int64_t columns,
                int32_t* tile, int32_t* column_sum) {
  for (int64_t c = 0; c < columns; ++c, weight += k) {
    switch (rows) {
      case 1: plain_product<1>(a, lda, weight, k, tile + c, column_sum + c); break;
      case 2: plain_product<2>(a, lda, weight, k, tile + c, column_sum + c); break;
      case 3: plain_product<3>(a, lda, weight, k, tile + c, column_sum + c); break;
      default: plain_product<4>(a, lda, weight, k, tile + c, column_sum + c);
    }
  }
}

}  // namespace
