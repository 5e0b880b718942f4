// Products of few u8 code rows with the rows of a row-major s8 weight, for weights that are not packed (tied weights,
// and compiled programs that never saw the tiles): packing such a weight at each call would cost several times the
// product.
//
// Bound: the reading of the weight. Each vector of it feeds one product for every code row and one for the column sums.
// The four rows that are met at once lie a quarter of the tile apart: four streams from memory, each in its order, where
// four rows side by side would be one.

namespace {

// Up to this many rows; beyond, packing a panel of columns for the rows of a block is cheaper.
constexpr int64_t kPlainRows = 12;
constexpr int kPlainColumns = 4;

// The sums over all lanes of four vectors.
inline __m128i add_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// One sum for each of the first `count` of four columns that are `apart`.
inline void store_sums(__m128i sums, int64_t count, int64_t apart, int32_t* to) {
  alignas(16) int32_t sum[kPlainColumns];
  _mm_store_si128((__m128i*)sum, sums);
  for (int64_t c = 0; c < count; ++c) to[c * apart] = sum[c];
}

// kRows code rows x `columns` weight rows, at most four, that are `apart`; for a missing one the first is met again. These
// are the rows of number `at` of four streams of `apart` rows: behind its end, each goes on with that of the next tile.
template <int kRows>
void plain_product(const uint8_t* a, int64_t lda, const int8_t* weight, int64_t k, int64_t columns, int64_t apart,
                   int64_t at, int32_t* tile, int32_t* column_sum) {
  const __m512i ones = _mm512_set1_epi8(1);
  const int8_t* row[kPlainColumns];
  __m512i sum[kRows][kPlainColumns], total[kPlainColumns];
#pragma GCC unroll 4
  for (int c = 0; c < kPlainColumns; ++c) {
    row[c] = weight + (c < columns ? c * apart : 0) * k;
    total[c] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r][c] = _mm512_setzero_si512();
  }
  const int64_t turn = (apart - at) * k - kAhead, next_tile = (kPlainColumns - 1) * apart * k;
  for (int64_t i = 0; i < k; i += 64) {
    const int64_t ahead = i + kAhead + (i < turn ? 0 : next_tile);
    const __mmask64 mask = k - i >= 64 ? ~0ull : (1ull << (k - i)) - 1;
    __m512i w[kPlainColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kPlainColumns; ++c) {
      w[c] = _mm512_maskz_loadu_epi8(mask, row[c] + i);
      if (kRows <= 2) _mm_prefetch((const char*)row[c] + ahead, _MM_HINT_T0);
      add_products(&total[c], ones, w[c]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = _mm512_loadu_si512(a + r * lda + i);
#pragma GCC unroll 4
      for (int c = 0; c < kPlainColumns; ++c) add_products(&sum[r][c], x, w[c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    store_sums(add_lanes(sum[r][0], sum[r][1], sum[r][2], sum[r][3]), columns, apart, tile + r * kTileCols);
  }
  store_sums(add_lanes(total[0], total[1], total[2], total[3]), columns, apart, column_sum);
}

// `columns` rows of `weight`, which is [.., k]; sums kTileCols apart, and the sums of the weight rows.
void plain_tile(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* weight, int64_t k, int64_t columns,
                int32_t* tile, int32_t* column_sum) {
  const int64_t apart = (columns + kPlainColumns - 1) / kPlainColumns;
  for (int64_t c = 0; c < apart; ++c) {
    const int8_t* from = weight + c * k;
    const int64_t count = (columns - c + apart - 1) / apart;
    for (int64_t r = 0; r < rows;) {
      const int64_t left = rows - r;
      const uint8_t* x = a + r * lda;
      int32_t* to = tile + r * kTileCols + c;
      if (left == 3 || left > 4) {
        plain_product<3>(x, lda, from, k, count, apart, c, to, column_sum + c);
        r += 3;
      } else if (left == 4) {
        plain_product<4>(x, lda, from, k, count, apart, c, to, column_sum + c);
        r += 4;
      } else if (left == 2) {
        plain_product<2>(x, lda, from, k, count, apart, c, to, column_sum + c);
        r += 2;
      } else {
        plain_product<1>(x, lda, from, k, count, apart, c, to, column_sum + c);
        r += 1;
      }
    }
  }
}

}  // namespace
