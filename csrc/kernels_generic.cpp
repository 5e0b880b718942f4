// Portable kernels: no instruction beyond the compiler's baseline (SSE2 on x86-64).
//
// Bound of the linear: the rate of 16-bit multiply-adds, which the compiler finds in the dot products below. Measured
// as in kernels_avx512vnni.cpp, on SSE2 against float32 in AVX-512: 0.3 to 0.4 of its speed. It saves memory, not time.
#include "kernels.h"
#include "codes.h"
#include "vec_generic.h"
#include "scratch.inl"
#include "elements.inl"
#include "rows.inl"
#include "exponential.inl"
#include "gelu.inl"
#include "activation.inl"
#include "unpack.inl"

namespace {

using Code = int16_t;
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileCols = 16;
constexpr int64_t kFloatRows = 3;
constexpr bool kPairs = false;
constexpr bool kEvenTiles = true;
constexpr bool kWidePanels = false;
// Code rows of one block stay in the second-level cache beside the weight panels they meet.
constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kBlockRows = 192;
constexpr int64_t kKeptWeights = 1024 * 1024;
constexpr bool kPipelined = false;
constexpr int64_t kDepthBlock = 256;

inline void begin_product() {}
inline void end_product() {}

// A block of the panel is widened to rows of int16 once and met by all rows of the tile.
void gemm_tile(const int16_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t, int64_t, int64_t depth,
               int32_t* tile, const int16_t* = nullptr) {
  int16_t wide[16][kDepthBlock];
  for (int64_t i = 0; i < rows * kTileCols; ++i) tile[i] = 0;
  for (int64_t k0 = 0; k0 < depth; k0 += kDepthBlock) {
    const int64_t count = mono_quant::round_up(mono_quant::smaller(kDepthBlock, depth - k0), 4);
    for (int64_t i = 0; i < count; i += 4) {
      const int8_t* from = b + (k0 + i) * 16;
      for (int64_t c = 0; c < 16; ++c) {
        for (int64_t j = 0; j < 4; ++j) wide[c][i + j] = from[c * 4 + j];
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int16_t* x = a + r * lda + k0;
      for (int64_t c = 0; c < 16; ++c) {
        const int16_t* w = wide[c];
        int32_t sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += (int32_t)x[i] * (int32_t)w[i];
        tile[r * kTileCols + c] += sum;
      }
    }
  }
}

// Panel `panel`: columns (rows of `weight`) panel*16 .. +16; also their sums.
void pack_panel(const int8_t* weight, int64_t n, int64_t k, int64_t panel, int8_t* packed, int32_t* sum) {
  const int64_t kp = mono_quant::round_up(k, mono_quant::kPanelDepth);
  memset(packed, 0, (size_t)(kp * 16));
  for (int64_t c = 0; c < 16; ++c) {
    int32_t total = 0;
    if (panel * 16 + c < n) {
      const int8_t* row = weight + (panel * 16 + c) * k;
      for (int64_t i = 0; i < k; ++i) {
        packed[(i / 4 * 16 + c) * 4 + i % 4] = row[i];
        total += row[i];
      }
    }
    sum[c] = total;
  }
}

// Up to this many rows a row-major weight is read as it is; beyond, packing a panel costs less.
constexpr int64_t kPlainRows = 4;

void plain_tile(const int16_t* a, int64_t lda, int64_t rows, const int8_t* weight, int64_t k, int64_t columns,
                int32_t* tile, int32_t* column_sum) {
  for (int64_t c = 0; c < columns; ++c, weight += k) {
    int32_t total = 0;
    for (int64_t i = 0; i < k; ++i) total += weight[i];
    column_sum[c] = total;
    for (int64_t r = 0; r < rows; ++r) {
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += (int32_t)a[r * lda + i] * (int32_t)weight[i];
      tile[r * kTileCols + c] = sum;
    }
  }
}

}  // namespace

#include "linear.inl"
#include "float_decode.inl"
#include "float_direct.inl"
#include "float_linear.inl"

namespace {

// How many codes and rows a product may read where fewer remain.
constexpr int64_t kCodesRead = 16, kRowsRead = 1;

}  // namespace

#include "codes_finish.inl"
#include "conv.inl"
#include "depthwise_plain.inl"
#include "depthwise.inl"
#include "codes_simple.inl"
#include "attention.inl"
#include "norm.inl"
#include "elementwise.inl"
#include "count.inl"

namespace mono_quant {

const KernelTable kGenericKernels = {
    "generic", 15e3, quantize_rows, pack_weight, unpack_weight, linear_scratch_bytes, linear,
    float_linear_scratch_bytes, float_linear, embedding,
    attention_scratch_bytes, attention, add_norm, rms_norm, rotate, multiply_rows, add_rows, widen_row, narrow_row, count_values,
    &kCodeKernels,
};

}  // namespace mono_quant
