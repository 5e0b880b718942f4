// Four lanes in the compiler's own vector types: SSE2 on x86-64, NEON on ARM, plain code elsewhere.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

constexpr int kLanes = 4;
typedef float F32 __attribute__((vector_size(16)));
typedef int32_t I32 __attribute__((vector_size(16)));
typedef uint32_t U32 __attribute__((vector_size(16)));

inline F32 load_f32(const float* p) { F32 v; memcpy(&v, p, 16); return v; }
inline void store_f32(float* p, F32 v) { memcpy(p, &v, 16); }
inline F32 splat(float v) { return F32{v, v, v, v}; }
inline F32 add(F32 a, F32 b) { return a + b; }
inline F32 sub(F32 a, F32 b) { return a - b; }
inline F32 mul(F32 a, F32 b) { return a * b; }
inline F32 div(F32 a, F32 b) { return a / b; }
inline F32 square_root(F32 a) {
  return F32{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
inline F32 blend(I32 mask, F32 if_set, F32 otherwise) { return (F32)(((I32)if_set & mask) | ((I32)otherwise & ~mask)); }
// The second operand comes back when either is NaN, so a NaN in `b` survives.
inline F32 min_keep(F32 a, F32 b) { return blend(a < b, a, b); }
inline F32 max_keep(F32 a, F32 b) { return blend(a > b, a, b); }
inline F32 absolute(F32 a) { return (F32)((I32)a & 0x7fffffff); }
inline F32 select_negative(F32 x, F32 if_negative, F32 otherwise) { return blend(x < splat(0.f), if_negative, otherwise); }

inline I32 load_i32(const int32_t* p) { I32 v; memcpy(&v, p, 16); return v; }
inline void store_i32(int32_t* p, I32 v) { memcpy(p, &v, 16); }
inline I32 splat_i32(int32_t v) { return I32{v, v, v, v}; }
// Unsigned, since the sums wrap on purpose.
inline I32 add_i32(I32 a, I32 b) { return (I32)((U32)a + (U32)b); }
inline I32 sub_i32(I32 a, I32 b) { return (I32)((U32)a - (U32)b); }
inline I32 mul_i32(I32 a, I32 b) { return (I32)((U32)a * (U32)b); }
template <int kBits>
inline I32 shift_left(I32 a) { return (I32)((U32)a << kBits); }
inline I32 half_i32(I32 a) { return a >> 1; }
inline F32 to_f32(I32 a) { return __builtin_convertvector(a, F32); }
// Half to even for |a| < 2^22: adding 1.5 * 2^23 leaves the rounded integer in the low bits.
inline I32 round_to_i32(F32 a) { return (I32)(a + 12582912.f) - 0x4b400000; }
inline F32 bits_to_f32(I32 a) { return (F32)a; }

inline I32 load_i8(const int8_t* p) { return I32{p[0], p[1], p[2], p[3]}; }

inline I32 load_u8(const uint8_t* p) { return I32{p[0], p[1], p[2], p[3]}; }

inline uint32_t bits_of(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
inline float float_of(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
  if (rest >= 0x400) return float_of(sign | ((rest << 13) + 0x38000000));
  const float tiny = (float)rest * 5.9604644775390625e-8f;  // 2^-24: half denormals are exact in float32
  return float_of(sign | bits_of(tiny));
}
inline uint16_t float_to_half(float f) {
  const uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to 65536 or beyond
  if (a < 0x38800000) {  // below the smallest normal half: let the float adder round to multiples of 2^-24
    return (uint16_t)(sign | (bits_of(float_of(a) + 0.5f) - 0x3f000000));
  }
  return (uint16_t)(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
}
inline uint16_t float_to_bf16(float f) {
  const uint32_t u = bits_of(f);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline F32 load_bf16(const uint16_t* p) {
  return F32{float_of((uint32_t)p[0] << 16), float_of((uint32_t)p[1] << 16), float_of((uint32_t)p[2] << 16),
             float_of((uint32_t)p[3] << 16)};
}
inline F32 load_f16(const uint16_t* p) {
  return F32{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
inline void store_bf16(uint16_t* p, F32 v) { for (int i = 0; i < 4; ++i) p[i] = float_to_bf16(v[i]); }
inline void store_f16(uint16_t* p, F32 v) { for (int i = 0; i < 4; ++i) p[i] = float_to_half(v[i]); }

inline float lowest_lane(F32 v) { float r = v[0]; for (int i = 1; i < 4; ++i) r = v[i] < r ? v[i] : r; return r; }
inline float highest_lane(F32 v) { float r = v[0]; for (int i = 1; i < 4; ++i) r = v[i] > r ? v[i] : r; return r; }
inline bool any_nan(F32 v) { return v[0] != v[0] || v[1] != v[1] || v[2] != v[2] || v[3] != v[3]; }

inline void store_codes(uint8_t* p, I32 v) {
  for (int i = 0; i < 4; ++i) p[i] = (uint8_t)(v[i] < 0 ? 0 : v[i] > 255 ? 255 : v[i]);
}
inline void store_codes4(uint8_t* p, I32 a, I32 b, I32 c, I32 d) {
  store_codes(p, a);
  store_codes(p + 4, b);
  store_codes(p + 8, c);
  store_codes(p + 12, d);
}

// Up to 4 dwords of each of up to 4 rows, one lane per row; what is missing reads as zero. `bytes` counts from p.
inline void load_transposed(const char* p, int64_t stride, int64_t rows, int64_t bytes, I32 out[4]) {
  int32_t in[4][4];
  memset(in, 0, sizeof(in));
  for (int64_t r = 0; r < 4 && r < rows; ++r) memcpy(in[r], p + r * stride, (size_t)(bytes < 16 ? bytes : 16));
  for (int i = 0; i < 4; ++i) out[i] = I32{in[0][i], in[1][i], in[2][i], in[3][i]};
}

template <int kBits>
inline I32 shift_right(I32 a) { return (I32)((U32)a >> kBits); }
inline I32 and_i32(I32 a, I32 b) { return a & b; }
inline I32 low_byte(I32 a) { return (I32)((U32)a << 24) >> 24; }
// The low four bits, less 8.
inline F32 low_nibble(I32 a) { return to_f32((a & 15) - 8); }
inline F32 low_half(I32 a) {
  return F32{half_to_float((uint16_t)a[0]), half_to_float((uint16_t)a[1]), half_to_float((uint16_t)a[2]),
             half_to_float((uint16_t)a[3])};
}

}  // namespace
