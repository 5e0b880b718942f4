// Eight lanes of AVX2 with FMA and F16C. Included only by the unit compiled for it; everything here is local to it.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int kLanes = 8;
typedef __m256 F32;
typedef __m256i I32;

inline F32 load_f32(const float* p) { return _mm256_loadu_ps(p); }
inline void store_f32(float* p, F32 v) { _mm256_storeu_ps(p, v); }
inline F32 splat(float v) { return _mm256_set1_ps(v); }
inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
inline F32 square_root(F32 a) { return _mm256_sqrt_ps(a); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
// The second operand comes back when either is NaN, so a NaN in `b` survives.
inline F32 min_keep(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F32 max_keep(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 absolute(F32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
inline F32 select_negative(F32 x, F32 if_negative, F32 otherwise) {
  return _mm256_blendv_ps(otherwise, if_negative, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
}

inline I32 load_i32(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store_i32(int32_t* p, I32 v) { _mm256_storeu_si256((__m256i*)p, v); }
inline I32 splat_i32(int32_t v) { return _mm256_set1_epi32(v); }
inline I32 add_i32(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
inline I32 sub_i32(I32 a, I32 b) { return _mm256_sub_epi32(a, b); }
inline I32 mul_i32(I32 a, I32 b) { return _mm256_mullo_epi32(a, b); }
template <int kBits>
inline I32 shift_left(I32 a) { return _mm256_slli_epi32(a, kBits); }
inline I32 half_i32(I32 a) { return _mm256_srai_epi32(a, 1); }
inline F32 to_f32(I32 a) { return _mm256_cvtepi32_ps(a); }
inline I32 round_to_i32(F32 a) { return _mm256_cvtps_epi32(a); }
inline F32 bits_to_f32(I32 a) { return _mm256_castsi256_ps(a); }

inline I32 load_i8(const int8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }

inline I32 load_u8(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }

inline F32 load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline F32 load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

// Eight dwords below 65536 as words.
inline __m128i narrow16(__m256i v) {
  return _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
inline void store_bf16(uint16_t* p, F32 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  _mm_storeu_si128((__m128i*)p, narrow16(_mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan)));
}
inline void store_f16(uint16_t* p, F32 v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline float lowest_lane(F32 v) {
  __m128 m = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}
inline float highest_lane(F32 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline bool any_nan(F32 v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }

// Clamps to [0, 255] and stores one byte per lane: both packs saturate.
inline void store_codes(uint8_t* p, I32 v) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
}
inline void store_codes4(uint8_t* p, I32 a, I32 b, I32 c, I32 d) {
  const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(bytes, order));
}

// Transposes 8 rows of 8 dwords in place.
inline void transpose8(__m256i r[8]) {
  __m256i t[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// Up to 8 dwords of each of up to 8 rows, one lane per row; what is missing reads as zero. `bytes` counts from p.
inline void load_transposed(const char* p, int64_t stride, int64_t rows, int64_t bytes, I32 out[8]) {
  for (int r = 0; r < 8; ++r) {
    if (r >= rows) {
      out[r] = _mm256_setzero_si256();
    } else if (bytes >= 32) {
      out[r] = _mm256_loadu_si256((const __m256i*)(p + r * stride));
    } else {
      alignas(32) char last[32] = {0};
      memcpy(last, p + r * stride, (size_t)bytes);
      out[r] = _mm256_load_si256((const __m256i*)last);
    }
  }
  transpose8(out);
}

template <int kBits>
inline I32 shift_right(I32 a) { return _mm256_srli_epi32(a, kBits); }
inline I32 and_i32(I32 a, I32 b) { return _mm256_and_si256(a, b); }
inline I32 low_byte(I32 a) { return _mm256_srai_epi32(_mm256_slli_epi32(a, 24), 24); }
// The low four bits, less 8.
inline F32 low_nibble(I32 a) {
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(a, _mm256_set1_epi32(15)), _mm256_set1_epi32(8)));
}
inline F32 low_half(I32 a) { return _mm256_cvtph_ps(narrow16(_mm256_and_si256(a, _mm256_set1_epi32(0xffff)))); }

}  // namespace
