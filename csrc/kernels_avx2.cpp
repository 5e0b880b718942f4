// AVX2 kernels, without VNNI.
//
// The one 8-bit multiply of AVX2, vpmaddubsw, clips sums of two products to 16 bits and would change answers. Codes are
// widened to 16 bits instead and multiplied by vpmaddwd, which is exact: 16 products per instruction, a quarter of what
// vpdpbusd does in 512 bits. That rate, with an addition for each, is the bound for many rows; for one row it is
// widening the weight. Measured as in kernels_avx512vnni.cpp on one Zen 5 core, from 128x768x3072 to 4096x384x1536: 110
// to 113 of the 119 products per nanosecond that the two instructions allow, 1.9 to 2.0 times torch's float32, one row
// 2.0 to 8.4 times.
#include "kernels.h"
#include "codes.h"
#include "vec_avx2.h"
#include "scratch.inl"
#include "elements.inl"
#include "rows.inl"
#include "exponential.inl"
#include "gelu.inl"
#include "activation.inl"
#include "unpack.inl"

#ifdef MONO_QUANT_AVX_VNNI
#include "avxvnni_product.inl"
#else
#include "avx2_product.inl"
#endif

namespace {

void pack_panel(const int8_t* weight, int64_t n, int64_t k, int64_t panel, int8_t* packed, int32_t* sum) {
  const int64_t kp = mono_quant::round_up(k, mono_quant::kPanelDepth), columns = n - panel * 16;
  for (int64_t i = 0; i < kp; i += 32) {
    for (int half = 0; half < 2; ++half) {
      __m256i r[8];
      for (int c = 0; c < 8; ++c) {
        const int64_t column = half * 8 + c;
        const int8_t* row = weight + (panel * 16 + column) * k + i;
        if (column >= columns || i >= k) {
          r[c] = _mm256_setzero_si256();
        } else if (k - i >= 32) {
          r[c] = _mm256_loadu_si256((const __m256i*)row);
        } else {
          alignas(32) int8_t last[32] = {0};
          memcpy(last, row, (size_t)(k - i));
          r[c] = _mm256_load_si256((const __m256i*)last);
        }
      }
      transpose8(r);
      for (int q = 0; q < 8; ++q) _mm256_storeu_si256((__m256i*)(packed + (i / 4 + q) * 64 + half * 32), r[q]);
    }
  }
  for (int64_t c = 0; c < 16; ++c) {
    int32_t total = 0;
    if (c < columns) {
      const int8_t* row = weight + (panel * 16 + c) * k;
      for (int64_t i = 0; i < k; ++i) total += row[i];
    }
    sum[c] = total;
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

#ifdef MONO_QUANT_AVX_VNNI
const KernelTable kAvxVnniKernels = {
    "avxvnni", 160e3,
#else
const KernelTable kAvx2Kernels = {
    "avx2", 80e3,
#endif
    quantize_rows, pack_weight, unpack_weight, linear_scratch_bytes, linear,
    float_linear_scratch_bytes, float_linear, embedding,
    attention_scratch_bytes, attention, add_norm, rms_norm, rotate, multiply_rows, add_rows, widen_row, narrow_row, count_values,
    &kCodeKernels,
};

}  // namespace mono_quant
