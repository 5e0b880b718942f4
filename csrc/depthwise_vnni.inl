// Sums of a depthwise convolution by vpdpbusd: four kernel positions are interleaved byte by byte, so that the four
// products it adds belong to one channel.

namespace {

constexpr int64_t kTapGroup = 4;

// Rows of 64 bytes to four vectors of dwords, each with one byte of every row. Vector j holds bytes 4j .. 4j+3 of each
// of the rows' four quarters.
inline void interleave4(__m512i r0, __m512i r1, __m512i r2, __m512i r3, __m512i* out) {
  const __m512i a = _mm512_unpacklo_epi8(r0, r1), b = _mm512_unpackhi_epi8(r0, r1);
  const __m512i c = _mm512_unpacklo_epi8(r2, r3), d = _mm512_unpackhi_epi8(r2, r3);
  out[0] = _mm512_unpacklo_epi16(a, c);
  out[1] = _mm512_unpackhi_epi16(a, c);
  out[2] = _mm512_unpacklo_epi16(b, d);
  out[3] = _mm512_unpackhi_epi16(b, d);
}

inline void prepare_taps(const int8_t* weight, int64_t taps, int64_t stride, int8_t* prepared) {
  for (int64_t t = 0; t < taps; t += 4, prepared += 256) {
    __m512i r[4], out[4];
    for (int i = 0; i < 4; ++i) {
      r[i] = t + i < taps ? _mm512_loadu_si512(weight + (t + i) * stride) : _mm512_setzero_si512();
    }
    interleave4(r[0], r[1], r[2], r[3], out);
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(prepared + i * 64, out[i]);
  }
}

inline void add_taps(const uint8_t* const* from, int64_t taps, int64_t first, int64_t count, const int8_t* weight,
                     int32_t* sums) {
  const __mmask64 mask = count >= 64 ? ~0ull : (1ull << count) - 1;
  __m512i acc[4];
  for (int i = 0; i < 4; ++i) acc[i] = _mm512_setzero_si512();
  for (int64_t t = 0; t < taps; t += 4, weight += 256) {
    __m512i r[4], x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) r[i] = _mm512_maskz_loadu_epi8(mask, from[t + i] + first);
    interleave4(r[0], r[1], r[2], r[3], x);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) add_products(&acc[i], x[i], _mm512_loadu_si512(weight + i * 64));
  }
  // Quarter q of vector j holds channels 16 q + 4 j and on: a transposition of quarters puts them in order.
  const __m512i a = _mm512_shuffle_i32x4(acc[0], acc[1], 0x44), b = _mm512_shuffle_i32x4(acc[0], acc[1], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(acc[2], acc[3], 0x44), d = _mm512_shuffle_i32x4(acc[2], acc[3], 0xee);
  _mm512_storeu_si512(sums, _mm512_shuffle_i32x4(a, c, 0x88));
  _mm512_storeu_si512(sums + 16, _mm512_shuffle_i32x4(a, c, 0xdd));
  _mm512_storeu_si512(sums + 32, _mm512_shuffle_i32x4(b, d, 0x88));
  _mm512_storeu_si512(sums + 48, _mm512_shuffle_i32x4(b, d, 0xdd));
}

}  // namespace
