// AVX-512 BF16: what differs from the AVX-512 VNNI kernels, rows of bfloat16 times weights of 4 or 8 bits.
#include "kernels.h"
#include "vec_avx512.h"
#include "scratch.inl"
#include "elements.inl"
#include "exponential.inl"
#include "gelu_table.inl"
#include "activation.inl"

namespace {

constexpr int64_t kFloatRows = 6;
constexpr bool kPairs = true;
constexpr bool kApart = false;
constexpr bool kPairTiles = false;
constexpr bool kPairFirstHigh = true;

}  // namespace

#include "float_decode.inl"
#include "float_direct.inl"
#include "float_linear.inl"
#include "bfloat16_pairs.inl"
#include "bfloat16_dot.inl"
#include "bfloat16_linear.inl"

namespace mono_quant {

const FloatLinearKernels kAvx512Bf16FloatLinear = {float_linear_scratch_bytes, float_linear};

}  // namespace mono_quant
