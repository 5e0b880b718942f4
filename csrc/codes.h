// The contract between the operator that runs steps on 8-bit codes (ops_codes.cpp) and their kernels. Images are
// channels-last: a pixel's channels are contiguous, then pixels, rows, samples.
#pragma once

#include <stdint.h>

namespace mono_quant {

// The most kernel positions that a depthwise convolution has.
constexpr int64_t kLargestKernel = 256;

// As many codes of 255 as fit a sum of 32 bits.
constexpr int64_t kMostSummed = INT32_MAX / 255;

// What follows the sums of a convolution.
enum Finish : int {
  kClamp = 0,  // scale and bias are in units of output codes; only bounds are applied
  kHardswish = 1,  // scale and bias are in real units; `inverse` comes after the function
  kSwish = 2,
  kFloat = 3,  // float32 output in real units, nothing is applied
};

// v = float(sum - offset[c]) * scale[c] + bias[c] (+ (other - other_zero) * other_scale), then
// code = round(min(max(f(v) * inverse, low), high)) + zero, half to even.
struct FinishArgs {
  // Arrays of one entry for each output channel, readable up to a multiple of 64.
  const int32_t* offset;
  const float* scale;
  const float* bias;
  const uint8_t* other;  // of the output's shape, or null
  float other_scale;
  int32_t other_zero;
  Finish kind;
  float inverse;
  float low, high;  // bounds less the zero point
  int32_t zero;
  bool bounded;  // kClamp only: whether `low` and `high` must be applied; else 0 and 255, which storing applies
  void* out;  // uint8 or float32 [pixels, outputs]
  int64_t outputs;
};

struct ConvArgs {
  const uint8_t* x;  // [batch, height, width, channels]
  int64_t batch, height, width, channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t out_height, out_width;
  uint8_t x_zero;  // what padding is filled with
  // Convolution: tiles of the matrix [outputs, kernel_h * kernel_w * channels], see pack_weight.
  // Depthwise: [kernel_h * kernel_w][round_up(channels, 64)].
  const int8_t* weight;
  FinishArgs finish;
};

struct PoolArgs {
  const uint8_t* x;
  int64_t batch, height, width, channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t out_height, out_width;
  uint8_t* out;
};

// out = round(min(max(a * a_scale + b * b_scale + shift, low), high)) + zero
struct AddArgs {
  const uint8_t* a;
  const uint8_t* b;
  float a_scale, b_scale, shift, low, high;
  int32_t zero;
  uint8_t* out;
};

// out = round(min(max(float((a - a_zero) * (b - b_zero)) * scale, low), high)) + zero
struct MultiplyArgs {
  const uint8_t* a;  // [batch, pixels, channels]
  const uint8_t* b;  // the same, or one pixel for each sample
  int64_t pixels, channels;
  bool gate;
  int32_t a_zero, b_zero;
  float scale, low, high;
  int32_t zero;
  uint8_t* out;
};

// float32 images to codes: round(min(max(x * inverse, -zero), 255 - zero)) + zero.
struct QuantizeArgs {
  const float* x;
  int64_t channels, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;  // elements
  float inverse;
  int32_t zero;
  uint8_t* out;
};

struct CodeKernels {
  // Output pixels [pixel_begin, pixel_end) counted over all samples, columns likewise; col_begin is a multiple of 64.
  int64_t (*conv_scratch_bytes)(const ConvArgs& args, int64_t pixels);
  void (*conv)(const ConvArgs& args, int64_t pixel_begin, int64_t pixel_end, int64_t col_begin, int64_t col_end,
               void* scratch);

  // Output rows [row_begin, row_end), counted over all samples.
  int64_t (*depthwise_scratch_bytes)(const ConvArgs& args);
  void (*depthwise)(const ConvArgs& args, int64_t row_begin, int64_t row_end, void* scratch);

  // Output rows likewise. Padding never wins: windows hold one pixel at least.
  void (*max_pool)(const PoolArgs& args, int64_t row_begin, int64_t row_end);

  // Sums over `pixels` pixels, kMostSummed at most: int32 [channels].
  void (*channel_sums)(const uint8_t* x, int64_t pixels, int64_t channels, int32_t* sums);

  void (*add)(const AddArgs& args, int64_t begin, int64_t end);
  // Pixels [begin, end), counted over all samples.
  void (*multiply)(const MultiplyArgs& args, int64_t begin, int64_t end);

  // Image rows [row_begin, row_end), counted over all samples. Answers whether a value is NaN.
  bool (*quantize)(const QuantizeArgs& args, int64_t row_begin, int64_t row_end);
};

}  // namespace mono_quant
