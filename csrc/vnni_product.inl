// Products of u8 code rows with packed s8 panels by vpdpbusd, which adds four products without saturating.
//
// 24 accumulators (6 rows x 64 columns) hide the latency of the instruction: per 4 steps of depth 4 weight loads and 6
// broadcasts feed 24 products.

namespace {

inline __m512i broadcast4(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

// sum += x * w in place. The intrinsic means the same, but gcc 12 copies sums from register to register around it.
inline void add_products(__m512i* sum, __m512i x, __m512i w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(x), "v"(w));
}

// How far ahead of the products weights are fetched, in bytes of each panel.
constexpr int64_t kAhead = 2048;

// `steps` groups of 4 in depth. For a single row two sets of sums break the dependency chains.
template <int kRows, int kPanels>
void product(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel_bytes, int64_t steps, int32_t* tile) {
  __m512i acc[kRows][kPanels];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kPanels; ++c) acc[r][c] = _mm512_setzero_si512();
  }
  // Few rows wait for the weights. Behind the end of its panel each stream goes on with that of the next tile.
  const int64_t turn = kRows <= 2 ? mono_quant::larger(0, steps - kAhead / 64) : steps;
  for (int64_t part = 0, s = 0; part < 2; ++part) {
    const int64_t end = part == 0 ? turn : steps, ahead = kAhead + (part == 0 ? 0 : (kPanels - 1) * panel_bytes);
#pragma GCC unroll 2
    for (; s < end; ++s) {
      __m512i w[kPanels];
#pragma GCC unroll 4
      for (int c = 0; c < kPanels; ++c) {
        const int8_t* from = b + c * panel_bytes + s * 64;
        w[c] = _mm512_loadu_si512(from);
        if (kRows <= 2) _mm_prefetch((const char*)from + ahead, _MM_HINT_T0);
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m512i x = broadcast4(a + r * lda + s * 4);
#pragma GCC unroll 4
        for (int c = 0; c < kPanels; ++c) add_products(&acc[r][c], x, w[c]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kPanels; ++c) _mm512_storeu_si512(tile + r * kTileCols + c * 16, acc[r][c]);
  }
}

template <int kRows>
inline void product_columns(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel_bytes, int64_t panels,
                            int64_t steps, int32_t* tile) {
  if (panels == 4) return product<kRows, 4>(a, lda, b, panel_bytes, steps, tile);
  for (; panels >= 2; panels -= 2, b += 2 * panel_bytes, tile += 32) {
    product<kRows, 2>(a, lda, b, panel_bytes, steps, tile);
  }
  if (panels) product<kRows, 1>(a, lda, b, panel_bytes, steps, tile);
}

template <int kRows>
inline void product_rows(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t panel_bytes,
                         int64_t panels, int64_t steps, int32_t* tile) {
  if (rows == kRows) return product_columns<kRows>(a, lda, b, panel_bytes, panels, steps, tile);
  if constexpr (kRows > 1) product_rows<kRows - 1>(a, lda, rows, b, panel_bytes, panels, steps, tile);
}

void vnni_tile(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t panel_bytes, int64_t panels,
               int64_t depth, int32_t* tile) {
  product_rows<kVnniRows>(a, lda, rows, b, panel_bytes, panels, (depth + 3) / 4, tile);
}

// 16 rows x 64 bytes at a time: a transposition of 16 x 16 groups of four bytes.
void pack_panel(const int8_t* weight, int64_t n, int64_t k, int64_t panel, int8_t* packed, int32_t* sum) {
  const int64_t first = panel * 16, columns = mono_quant::smaller(16, n - first);
  __m512i total = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < k; i += 64, packed += 1024) {
    const __mmask64 mask = k - i >= 64 ? ~0ull : (1ull << (k - i)) - 1;
    __m512i r[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) {
      r[c] = c < columns ? _mm512_maskz_loadu_epi8(mask, weight + (first + c) * k + i) : _mm512_setzero_si512();
    }
    transpose16(r);
#pragma GCC unroll 16
    for (int q = 0; q < 16; ++q) {
      _mm512_storeu_si512(packed + q * 64, r[q]);
      total = _mm512_dpbusd_epi32(total, ones, r[q]);
    }
  }
  _mm512_storeu_si512(sum, total);
}

}  // namespace
