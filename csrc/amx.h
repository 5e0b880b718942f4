// The tile operations the AMX kernels need. With MONO_QUANT_AMX_EMULATED they are plain loops, so that blocking,
// padding and epilogue can be tested on processors without tiles; release builds never define it.
// TILE_LOAD_ONCE leaves what else is in the first-level cache there.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef MONO_QUANT_AMX_EMULATED

namespace {

thread_local uint8_t emulated_tiles[8][16][64];

inline void emulated_load(int t, const void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(emulated_tiles[t][r], (const char*)p + r * stride, 64);
}
inline void emulated_store(int t, void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy((char*)p + r * stride, emulated_tiles[t][r], 64);
}
inline void emulated_zero(int t) { memset(emulated_tiles[t], 0, sizeof(emulated_tiles[t])); }
inline void emulated_dpbusd(int sum, int a, int b) {
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 16; ++c) {
      int32_t total;
      memcpy(&total, emulated_tiles[sum][r] + c * 4, 4);
      uint32_t wrapped = (uint32_t)total;
      for (int k = 0; k < 64; ++k) {
        wrapped += (uint32_t)((int32_t)emulated_tiles[a][r][k] * (int32_t)(int8_t)emulated_tiles[b][k / 4][c * 4 + k % 4]);
      }
      memcpy(emulated_tiles[sum][r] + c * 4, &wrapped, 4);
    }
  }
}
inline float emulated_bf16(const uint8_t* from) {
  uint16_t half;
  memcpy(&half, from, 2);
  const uint32_t word = (uint32_t)half << 16;
  float v;
  memcpy(&v, &word, 4);
  return v;
}
inline void emulated_dpbf16(int sum, int a, int b) {
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 16; ++c) {
      float part[2] = {0.f, 0.f}, total;
      for (int k = 0; k < 32; ++k) {
        const float w = emulated_bf16(emulated_tiles[b][k / 2] + c * 4 + k % 2 * 2);
        part[k % 2] = __builtin_fmaf(emulated_bf16(emulated_tiles[a][r] + k * 2), w, part[k % 2]);
      }
      memcpy(&total, emulated_tiles[sum][r] + c * 4, 4);
      total += part[0] + part[1];
      memcpy(emulated_tiles[sum][r] + c * 4, &total, 4);
    }
  }
}

}  // namespace

#define TILE_CONFIGURE() ((void)0)
#define TILE_RELEASE() ((void)0)
#define TILE_ZERO(t) emulated_zero(t)
#define TILE_LOAD(t, p, stride) emulated_load(t, p, stride)
#define TILE_LOAD_ONCE(t, p, stride) emulated_load(t, p, stride)
#define TILE_STORE(t, p, stride) emulated_store(t, p, stride)
#define TILE_DPBUSD(sum, a, b) emulated_dpbusd(sum, a, b)
#define TILE_DPBF16(sum, a, b) emulated_dpbf16(sum, a, b)
#define TILE_BARRIER() ((void)0)

#else

#include <immintrin.h>

namespace {

// Palette 1: all eight tiles of 16 rows by 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {0};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "the processor reads 64 bytes");

// gcc's intrinsics do not say which memory they read and write: a configuration built on the stack could be thrown away
// as never read, codes could be stored after the tile load that wants them. Hence the constant, and the barriers.
constexpr TileConfig kTileConfig;

inline void configure_tiles() {
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&kTileConfig);
}

}  // namespace

#define TILE_CONFIGURE() configure_tiles()
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define TILE_LOAD_ONCE(t, p, stride) _tile_stream_loadd(t, p, stride)
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_DPBUSD(sum, a, b) _tile_dpbusd(sum, a, b)
#define TILE_DPBF16(sum, a, b) _tile_dpbf16ps(sum, a, b)
#define TILE_BARRIER() __asm__ volatile("" ::: "memory")

#endif
