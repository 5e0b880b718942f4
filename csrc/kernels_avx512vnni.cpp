// AVX-512 VNNI kernels.
//
// Bound of the linear: for many rows the rate of vpdpbusd (64 products each); for one row the reading of the weight.
// Measured on one Zen 4 core against torch 2.13, quantization and epilogue included: 0.84 to 1.11 of the speed of
// torch._int_mm, which does the product alone, and 4.7 to 6.7 times float32, from 128x768x3072 to 4096x384x1536 (rows,
// inputs, outputs); one row 3.4 (768x768) and 8.2 (4096x4096) times float32. On one Zen 5 core 470 to 520 of the 540
// products per nanosecond that vpdpbusd allows, 8.3 to 9.0 times float32; one row 3.3 and 15 times.
#include "kernels.h"
#include "codes.h"
#include "vec_avx512.h"
#include "scratch.inl"
#include "elements.inl"
#include "rows.inl"
#include "exponential.inl"
#include "gelu_table.inl"
#include "activation.inl"
#include "unpack.inl"

namespace {

using Code = uint8_t;
constexpr int64_t kTileRows = 6;
constexpr int64_t kTileCols = 64;
constexpr int64_t kFloatRows = 6;
constexpr bool kPairs = false;
constexpr int64_t kVnniRows = kTileRows;
constexpr bool kEvenTiles = true;
constexpr bool kWidePanels = false;
// Code rows of one block stay in the second-level cache beside the weight panels they meet.
constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kBlockRows = 192;
constexpr int64_t kKeptWeights = 1024 * 1024;
constexpr bool kPipelined = false;

inline void begin_product() {}
inline void end_product() {}

}  // namespace

#include "vnni_product.inl"
#include "vnni_plain.inl"

namespace {

inline void gemm_tile(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t panel_bytes,
                      int64_t panels, int64_t depth, int32_t* tile, const int16_t* = nullptr) {
  vnni_tile(a, lda, rows, b, panel_bytes, panels, depth, tile);
}

}  // namespace

#include "linear.inl"
#include "float_decode.inl"
#include "float_direct.inl"
#include "float_linear.inl"

namespace {

// How many codes and rows a product may read where fewer remain.
constexpr int64_t kCodesRead = 4, kRowsRead = 1;

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

const KernelTable kAvx512VnniKernels = {
    "avx512vnni", 180e3, quantize_rows, pack_weight, unpack_weight, linear_scratch_bytes, linear,
    float_linear_scratch_bytes, float_linear, embedding,
    attention_scratch_bytes, attention, add_norm, rms_norm, rotate, multiply_rows, add_rows, widen_row, narrow_row, count_values,
    &kCodeKernels,
};

}  // namespace mono_quant
