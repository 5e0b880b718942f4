// AVX-512 VNNI kernels.
//
// Bound of the linear: for many rows the rate of vpdpbusd (64 products each); for one row the reading of the weight.
#include "kernels.h"
#include "vec_avx512.h"
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
constexpr int64_t kVnniRows = kTileRows;
constexpr bool kEvenTiles = true;

inline void begin_product() {}
inline void end_product() {}

}  // namespace

#include "vnni_product.inl"

namespace {

inline void gemm_tile(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t panel_bytes,
                      int64_t panels, int64_t depth, int32_t* tile) {
  vnni_tile(a, lda, rows, b, panel_bytes, panels, depth, tile);
}

}  // namespace

#include "linear.inl"
#include "float_linear.inl"

namespace mono_quant {

const KernelTable kAvx512VnniKernels = {
    "avx512vnni", 180e3, quantize_rows, pack_weight, unpack_weight, linear_scratch_bytes, linear,
    float_linear_scratch_bytes, float_linear, embedding,
};

}  // namespace mono_quant
