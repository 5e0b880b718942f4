// AMX kernels, for int8 and bfloat16; what is not a product of many rows is the AVX-512 VNNI code.
//
// Bound: one tile load for each tile product (2 x 2 tiles share two loads of codes and two of weights among four
// products); see amx_pipeline.inl.
#include "kernels.h"
#include "codes.h"
#include "vec_avx512.h"
#include "amx.h"
#include "scratch.inl"
#include "elements.inl"
#include "rows.inl"
#include "exponential.inl"
#include "gelu_table.inl"
#include "activation.inl"
#include "unpack.inl"

namespace {

using Code = uint8_t;
constexpr int64_t kFloatRows = 6;
constexpr bool kPairs = true;
constexpr bool kApart = true;
constexpr bool kPairFirstHigh = false;
constexpr bool kPairTiles = true;
constexpr int64_t kTileRows = 32;
// Up to this many rows a product of tiles is mostly padding.
constexpr int64_t kVnniRows = 4;
constexpr int64_t kTileCols = 64;
// Tiles come in sixteen rows: two even halves of 48 rows would each fill two.
constexpr bool kEvenTiles = false;
constexpr bool kWidePanels = false;
// Code rows of one block stay in the second-level cache beside the weight panels they meet.
constexpr int64_t kBlockBytes = 512 * 1024;
constexpr int64_t kBlockRows = 512;
constexpr int64_t kKeptWeights = 1024 * 1024;
constexpr bool kPipelined = true;

}  // namespace

#include "vnni_product.inl"
#include "vnni_plain.inl"

namespace {

inline void begin_product() { TILE_CONFIGURE(); }
inline void end_product() { TILE_RELEASE(); }

// Up to 32 rows x 32 columns. Rows past `rows` are read (the code rows are padded to full tiles) and their sums
// dropped.
inline void product_2x2(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel_bytes, int64_t blocks,
                        int32_t* tile) {
  const uint8_t* a1 = a + 16 * lda;
  const int8_t* b1 = b + panel_bytes;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t i = 0; i < blocks; ++i) {
    TILE_LOAD(6, b + i * 1024, 64);
    TILE_LOAD(4, a + i * 64, lda);
    TILE_DPBUSD(0, 4, 6);
    TILE_LOAD(7, b1 + i * 1024, 64);
    TILE_DPBUSD(1, 4, 7);
    TILE_LOAD(5, a1 + i * 64, lda);
    TILE_DPBUSD(2, 5, 6);
    TILE_DPBUSD(3, 5, 7);
  }
  TILE_STORE(0, tile, kTileCols * 4);
  TILE_STORE(1, tile + 16, kTileCols * 4);
  TILE_STORE(2, tile + 16 * kTileCols, kTileCols * 4);
  TILE_STORE(3, tile + 16 * kTileCols + 16, kTileCols * 4);
}

inline void product_2x1(const uint8_t* a, int64_t lda, const int8_t* b, int64_t blocks, int32_t* tile) {
  TILE_ZERO(0);
  TILE_ZERO(2);
  for (int64_t i = 0; i < blocks; ++i) {
    TILE_LOAD(6, b + i * 1024, 64);
    TILE_LOAD(4, a + i * 64, lda);
    TILE_DPBUSD(0, 4, 6);
    TILE_LOAD(5, a + 16 * lda + i * 64, lda);
    TILE_DPBUSD(2, 5, 6);
  }
  TILE_STORE(0, tile, kTileCols * 4);
  TILE_STORE(2, tile + 16 * kTileCols, kTileCols * 4);
}

inline void product_1x2(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel_bytes, int64_t blocks,
                        int32_t* tile) {
  TILE_ZERO(0);
  TILE_ZERO(1);
  for (int64_t i = 0; i < blocks; ++i) {
    TILE_LOAD(4, a + i * 64, lda);
    TILE_LOAD(6, b + i * 1024, 64);
    TILE_DPBUSD(0, 4, 6);
    TILE_LOAD(7, b + panel_bytes + i * 1024, 64);
    TILE_DPBUSD(1, 4, 7);
  }
  TILE_STORE(0, tile, kTileCols * 4);
  TILE_STORE(1, tile + 16, kTileCols * 4);
}

inline void product_1x1(const uint8_t* a, int64_t lda, const int8_t* b, int64_t blocks, int32_t* tile) {
  TILE_ZERO(0);
  for (int64_t i = 0; i < blocks; ++i) {
    TILE_LOAD(4, a + i * 64, lda);
    TILE_LOAD(6, b + i * 1024, 64);
    TILE_DPBUSD(0, 4, 6);
  }
  TILE_STORE(0, tile, kTileCols * 4);
}

void gemm_tile(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t panel_bytes, int64_t panels,
               int64_t depth, int32_t* tile, const int16_t* = nullptr) {
  TILE_BARRIER();
  if (rows <= kVnniRows) return vnni_tile(a, lda, rows, b, panel_bytes, panels, depth, tile);
  const int64_t blocks = (depth + 63) / 64;
  for (int64_t p = 0; p < panels; p += 2) {
    const int8_t* from = b + p * panel_bytes;
    const bool pair = p + 1 < panels;
    if (rows > 16 && pair) product_2x2(a, lda, from, panel_bytes, blocks, tile + p * 16);
    else if (rows > 16) product_2x1(a, lda, from, blocks, tile + p * 16);
    else if (pair) product_1x2(a, lda, from, panel_bytes, blocks, tile + p * 16);
    else product_1x1(a, lda, from, blocks, tile + p * 16);
  }
  TILE_BARRIER();
}

}  // namespace

#include "linear.inl"
#include "amx_pipeline.inl"
#include "float_decode.inl"
#include "float_direct.inl"
#include "float_linear.inl"
#include "bfloat16_pairs.inl"
#include "bfloat16_tiles.inl"
#include "bfloat16_linear.inl"

namespace {

// How many codes and rows a product may read where fewer remain.
constexpr int64_t kCodesRead = 64, kRowsRead = 32;

}  // namespace

#include "codes_finish.inl"
#include "conv.inl"
#include "depthwise_vnni.inl"
#include "depthwise.inl"
#include "codes_simple.inl"
#include "attention.inl"
#include "norm.inl"
#include "elementwise.inl"
#include "count.inl"

namespace mono_quant {

#ifdef MONO_QUANT_AMX_EMULATED
const KernelTable kAmxEmulatedKernels = {
    "amx_emulated",
#else
const KernelTable kAmxKernels = {
    "amx",
#endif
    1000e3, quantize_rows, pack_weight, unpack_weight, linear_scratch_bytes, linear,
    float_linear_scratch_bytes, float_linear, embedding,
    attention_scratch_bytes, attention, add_norm, rms_norm, rotate, multiply_rows, add_rows, widen_row, narrow_row, count_values,
    &kCodeKernels,
};

}  // namespace mono_quant
