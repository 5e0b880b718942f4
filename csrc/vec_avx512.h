// Sixteen lanes of AVX-512. Included only by units compiled for it; everything here is local to the unit.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int kLanes = 16;
typedef __m512 F32;
typedef __m512i I32;

inline F32 load_f32(const float* p) { return _mm512_loadu_ps(p); }
inline void store_f32(float* p, F32 v) { _mm512_storeu_ps(p, v); }
inline F32 splat(float v) { return _mm512_set1_ps(v); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 square_root(F32 a) { return _mm512_sqrt_ps(a); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand comes back when either is NaN, so a NaN in `b` survives.
inline F32 min_keep(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 max_keep(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 absolute(F32 a) { return _mm512_abs_ps(a); }
inline F32 select_negative(F32 x, F32 if_negative, F32 otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), otherwise, if_negative);
}

inline I32 load_i32(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_i32(int32_t* p, I32 v) { _mm512_storeu_si512(p, v); }
inline I32 splat_i32(int32_t v) { return _mm512_set1_epi32(v); }
inline I32 add_i32(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 sub_i32(I32 a, I32 b) { return _mm512_sub_epi32(a, b); }
inline I32 mul_i32(I32 a, I32 b) { return _mm512_mullo_epi32(a, b); }
template <int kBits>
inline I32 shift_left(I32 a) { return _mm512_slli_epi32(a, kBits); }
inline I32 half_i32(I32 a) { return _mm512_srai_epi32(a, 1); }
inline F32 to_f32(I32 a) { return _mm512_cvtepi32_ps(a); }
inline I32 round_to_i32(F32 a) { return _mm512_cvtps_epi32(a); }
inline F32 bits_to_f32(I32 a) { return _mm512_castsi512_ps(a); }

inline I32 load_i8(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }

inline I32 load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }

inline F32 load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F32 load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

// By hand and not by vcvtneps2bf16, which flushes denormals and is missing on the first VNNI processors.
inline void store_bf16(uint16_t* p, F32 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  r = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), r, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
inline void store_f16(uint16_t* p, F32 v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline float lowest_lane(F32 v) { return _mm512_reduce_min_ps(v); }
inline float highest_lane(F32 v) { return _mm512_reduce_max_ps(v); }
inline bool any_nan(F32 v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }

// Clamps to [0, 255] and stores one byte per lane.
inline void store_codes(uint8_t* p, I32 v) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtusepi32_epi8(_mm512_max_epi32(v, _mm512_setzero_si512())));
}
// The same for four vectors: two rounds of saturating packs are cheaper than four narrowing stores.
inline void store_codes4(uint8_t* p, I32 a, I32 b, I32 c, I32 d) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
}

// Transposes 16 rows of 16 dwords in place.
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Up to 16 dwords of each of up to 16 rows, one lane per row; what is missing reads as zero. `bytes` counts from p.
inline void load_transposed(const char* p, int64_t stride, int64_t rows, int64_t bytes, I32 out[16]) {
  const __mmask64 mask = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    out[r] = r < rows ? _mm512_maskz_loadu_epi8(mask, p + r * stride) : _mm512_setzero_si512();
  }
  transpose16(out);
}

template <int kBits>
inline I32 shift_right(I32 a) { return _mm512_srli_epi32(a, kBits); }
inline I32 and_i32(I32 a, I32 b) { return _mm512_and_si512(a, b); }
inline I32 low_byte(I32 a) { return _mm512_srai_epi32(_mm512_slli_epi32(a, 24), 24); }
// The low four bits, less 8, by table: the permutation looks at no higher bits.
inline F32 low_nibble(I32 a) {
  const F32 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_permutexvar_ps(a, table);
}
inline F32 low_half(I32 a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }

}  // namespace
