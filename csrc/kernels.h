// The contract between the operators (ops_*.cpp, which know torch) and the kernels (one translation unit per
// instruction set, which know raw pointers only).
//
// Every kernel unit fills one KernelTable. All else in such a unit has internal linkage: an inline function or a
// template with external linkage would be emitted by several units under one name, the linker would keep any one of
// them, and code for a wide instruction set could then run on a processor that lacks it.
#pragma once

#include <stdint.h>

namespace mono_quant {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

// The packed weight: [ceil(n/16)][ceil(k/64)][16][16][4], zero padded; see docs of pack_weight.
constexpr int64_t kPanelColumns = 16;
constexpr int64_t kPanelDepth = 64;

// Code rows that a kernel may read behind the last: tiles have a fixed height.
constexpr int64_t kReadablePastEnd = 32;

static constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
static constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// out[r, c] = act(((sum_k (x[r,k]-zx[r])*(w[c,k]-zw[c])) * sx[r]) * sw[c] + bias[c])
struct LinearArgs {
  const void* x;  // rows of k elements, last dimension contiguous
  int64_t x_stride;  // elements from one row to the next
  DType dtype;  // of x and of out
  int64_t m, k, n;
  const int8_t* packed;  // packed weight, or null when `plain` is given
  const int8_t* plain;  // [n, k] row-major weight, packed on the fly
  const int32_t* column_sum;  // [n] sums of weight codes; null with `plain`
  const float* weight_scale;  // [n]
  const int8_t* weight_zero_point;  // [n] or null
  const float* bias;  // [n] or null
  Activation activation;
  void* out;  // [m, n] contiguous
  // Rows already quantized (all three set) or to be quantized by the kernel (all three null).
  const uint8_t* codes;  // [m, round_up(k, 64)], with kReadablePastEnd more rows readable behind
  const float* x_scale;  // [m]
  const int32_t* x_zero_point;  // [m]
};

// The two layers that keep float activations: weights as int4/int8 words with group scales, or as float16.
struct FloatLinearArgs {
  const void* x;
  int64_t x_stride;
  DType dtype, out_dtype;  // of x and of out, which is float32 or as x
  int64_t m, k, n;
  int bits;  // 4 or 8: `weight` holds int32 words; 16: `weight` holds float16
  const void* weight;
  int64_t row_bytes;  // from one weight row to the next
  int64_t group_size;  // divides k; 0 when bits is 16
  const float* weight_scale;  // [n, groups]
  const int8_t* weight_zero_point;  // [n, groups] or null
  const float* bias;
  Activation activation;
  void* out;
};

// One head of one sample, float32 but for keys and values; strides are elements from one row to the next.
// out = softmax(q k^T * scale + mask) v; a query that sees no key answers zeros.
struct AttentionArgs {
  const float* q;  // [queries, depth]
  const void* k;  // [keys, depth]
  const void* v;  // [keys, depth]
  DType kv_dtype;  // float32 or bfloat16
  int64_t q_stride, k_stride, v_stride;
  int64_t queries, keys, depth;
  float scale;
  bool causal;  // the last query sees all keys, the one before it all but the last, ...
  const float* mask;  // [queries, keys] or null; rows are readable up to a multiple of kMaskColumns
  int64_t mask_stride;  // 0: one row for all queries
  float* out;  // [queries, depth]
  int64_t out_stride;
};
constexpr int64_t kMaskColumns = 64;

// out = (v - mean(v)) / sqrt(variance(v) + eps) * weight + bias with v = x + residual, row by row; all float32
// [rows, n] and contiguous. `out` may be `x` or `residual`.
struct NormArgs {
  const float* x;
  const float* residual;
  int64_t n;
  const float* weight;
  const float* bias;
  float eps;
  float* out;
};

// out = v / sqrt(mean(v^2) + eps) * weight with v = x + residual, row by row; all float32 [rows, n], contiguous.
struct RmsNormArgs {
  const float* x;
  const float* residual;  // or null
  int64_t n;
  const float* weight;
  float eps;
  float* sum;  // gets v, or null; may be `x` or `residual`
  float* out;
};

struct KernelTable {
  const char* name;

  // Products per microsecond and thread, roughly: decides only how many threads a call is worth.
  double speed;

  // Rows [0, rows) of x to uint8 codes; each code row is filled with zeros up to code_stride.
  void (*quantize_rows)(const void* x, DType dtype, int64_t x_stride, int64_t rows, int64_t k, uint8_t* codes,
                        int64_t code_stride, float* scale, int32_t* zero_point);

  // Panels [panel_begin, panel_end) of the packed layout.
  void (*pack_weight)(const int8_t* weight, int64_t n, int64_t k, int64_t panel_begin, int64_t panel_end,
                      int8_t* packed);
  void (*unpack_weight)(const int8_t* packed, int64_t n, int64_t k, int64_t panel_begin, int64_t panel_end,
                        int8_t* weight);

  // Rows [row_begin, row_end) and columns [col_begin, col_end) of the output; col_begin is a multiple of 64, or with at
  // most four rows of 32.
  // `scratch` is 64-byte aligned and holds linear_scratch_bytes(...) bytes.
  int64_t (*linear_scratch_bytes)(const LinearArgs& args, int64_t rows);
  void (*linear)(const LinearArgs& args, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                 void* scratch);

  int64_t (*float_linear_scratch_bytes)(const FloatLinearArgs& args, int64_t rows);
  void (*float_linear)(const FloatLinearArgs& args, int64_t row_begin, int64_t row_end, int64_t col_begin,
                       int64_t col_end, void* scratch);

  // out[i, :] = (weight[index[i], :] - zero_point) * scale; indices are already checked.
  void (*embedding)(const int64_t* index, int64_t count, const int8_t* weight, int64_t dim, const float* scale,
                    const int8_t* zero_point, DType dtype, void* out);

  int64_t (*attention_scratch_bytes)(const AttentionArgs& args);
  void (*attention)(const AttentionArgs& args, void* scratch);

  void (*add_norm)(const NormArgs& args, int64_t row_begin, int64_t row_end);

  void (*rms_norm)(const RmsNormArgs& args, int64_t row_begin, int64_t row_end);
  // Rotary positions in place: x [heads, depth], the angles [depth] of one position.
  void (*rotate)(float* x, int64_t heads, int64_t depth, const float* cosine, const float* sine);
  void (*multiply)(float* x, const float* by, int64_t count);
  void (*add)(const float* a, const float* b, float* out, int64_t count);
  // Between float32 and another type, or the same.
  void (*widen)(const void* from, DType dtype, float* to, int64_t count);
  void (*narrow)(const float* from, void* to, DType dtype, int64_t count);

  // Histogram of float32 values, see count.inl; `tables` holds 4 * bins counts.
  void (*count_values)(const float* x, int64_t count, float inverse_width, int64_t bins, uint32_t* tables);

  const struct CodeKernels* codes;  // see codes.h
};

// What a unit has that differs from another one's in this alone.
struct FloatLinearKernels {
  int64_t (*scratch_bytes)(const FloatLinearArgs& args, int64_t rows);
  void (*run)(const FloatLinearArgs& args, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
              void* scratch);
};

// One per unit that is built for this architecture.
extern const KernelTable kGenericKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvxVnniKernels;
extern const KernelTable kAvx512VnniKernels;
// Beside the AVX-512 VNNI ones.
extern const FloatLinearKernels kAvx512Bf16FloatLinear;
extern const KernelTable kAmxKernels;
// Only in the tests: the AMX unit built with emulated tiles.
extern const KernelTable kAmxEmulatedKernels;

}  // namespace mono_quant
