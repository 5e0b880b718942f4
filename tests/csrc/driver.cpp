// Runs every kernel table on raw pointers, without torch, and compares with naive loops. Built with sanitizers by
// tools/sanitize.sh and without by the test suite. Buffers have exactly the size the contract in kernels.h names, stand
// at odd element offsets, and outputs are poisoned and fenced.
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "codes.h"
#include "isa.h"
#include "kernels.h"
#include "meetings.h"

using namespace mono_quant;

namespace {

int failures = 0;
std::mt19937 source(7);

void expect(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED %s\n", what.c_str());
}

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(source); }
float normal() { return std::normal_distribution<float>()(source); }

float from_bf16(uint16_t v) {
  const uint32_t bits = (uint32_t)v << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
uint16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float from_half(uint16_t v) {
  const int exponent = v >> 10 & 31, fraction = v & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                          : exponent ? std::ldexp(1024.f + fraction, exponent - 25)
                                     : std::ldexp((float)fraction, -24);
  return v & 0x8000 ? -magnitude : magnitude;
}
// Only for values that a half holds or nearly holds: truncates.
uint16_t to_half(float f) {
  if (f == 0) return 0;
  int exponent;
  const float fraction = std::frexp(std::fabs(f), &exponent);
  if (exponent < -13) return 0;
  return (uint16_t)((f < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | ((int)(fraction * 2048) - 1024));
}

// A heap block of exactly `count` elements behind one unused element, so that no pointer is aligned beyond its type.
template <typename T>
struct Buffer {
  std::vector<T> all;
  int64_t fence;
  explicit Buffer(int64_t count, int64_t fence = 0) : all((size_t)(count + 1 + fence)), fence(fence) {
    std::memset((void*)all.data(), 0xa5, all.size() * sizeof(T));
  }
  T* data() { return all.data() + 1; }
  T& operator[](int64_t i) { return all[(size_t)(i + 1)]; }
  bool fenced() const {
    for (size_t i = 0; i < all.size(); ++i) {
      if (i > 0 && i < all.size() - (size_t)fence) continue;
      for (size_t j = 0; j < sizeof(T); ++j) {
        if (((const unsigned char*)&all[i])[j] != 0xa5) return false;
      }
    }
    return true;
  }
};

// 64-byte aligned, exact, freed on scope exit.
struct Aligned {
  void* p;
  explicit Aligned(int64_t bytes) : p(std::aligned_alloc(64, (size_t)round_up(bytes < 64 ? 64 : bytes, 64))) {
    std::memset(p, 0x5a, (size_t)bytes);
  }
  ~Aligned() { std::free(p); }
};

struct Input {
  DType dtype;
  int64_t rows, k, stride;
  Buffer<float> f32;
  Buffer<uint16_t> u16;
  Input(DType dtype, int64_t rows, int64_t k, int64_t gap)
      : dtype(dtype), rows(rows), k(k), stride(k + gap),
        f32(dtype == kFloat32 && rows ? (rows - 1) * (k + gap) + k : 0),
        u16(dtype != kFloat32 && rows ? (rows - 1) * (k + gap) + k : 0) {
    const float size = std::ldexp(1.f, (int)pick(-6, 4)), shift = (float)pick(-1, 1) * size;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < k; ++i) {
        const float v = normal() * size + shift;
        if (dtype == kFloat32) f32[r * stride + i] = v;
        else u16[r * stride + i] = dtype == kBFloat16 ? to_bf16(v) : to_half(v);
      }
    }
  }
  const void* data() { return dtype == kFloat32 ? (const void*)f32.data() : (const void*)u16.data(); }
  float at(int64_t r, int64_t i) {
    if (dtype == kFloat32) return f32[r * stride + i];
    return dtype == kBFloat16 ? from_bf16(u16[r * stride + i]) : from_half(u16[r * stride + i]);
  }
};

struct Output {
  DType dtype;
  Buffer<float> f32;
  Buffer<uint16_t> u16;
  Output(DType dtype, int64_t count)
      : dtype(dtype), f32(dtype == kFloat32 ? count : 0, 64), u16(dtype != kFloat32 ? count : 0, 64) {}
  void* data() { return dtype == kFloat32 ? (void*)f32.data() : (void*)u16.data(); }
  float at(int64_t i) {
    return dtype == kFloat32 ? f32[i] : dtype == kBFloat16 ? from_bf16(u16[i]) : from_half(u16[i]);
  }
  bool fenced() const { return dtype == kFloat32 ? f32.fenced() : u16.fenced(); }
  // Twice the rounding of the dtype.
  float tolerance() const { return dtype == kFloat32 ? 2.4e-7f : dtype == kBFloat16 ? 1.f / 128 : 1.f / 1024; }
};

struct NaiveRow {
  std::vector<int> codes;
  float scale;
  int zero_point;
};

NaiveRow naive_row(Input& x, int64_t r) {
  NaiveRow row;
  float low = 0, high = 0;
  bool finite = true;
  for (int64_t i = 0; i < x.k; ++i) {
    const float v = x.at(r, i);
    finite = finite && std::isfinite(v);
    low = std::fmin(low, v);
    high = std::fmax(high, v);
  }
  row.codes.assign((size_t)x.k, 0);
  row.zero_point = 0;
  row.scale = NAN;
  if (!finite) return row;
  row.scale = std::fmax(high / 255.f - low / 255.f, 1.17549435e-38f);
  const float inverse = 1.f / row.scale;
  row.zero_point = (int)std::nearbyint(-low * inverse);
  for (int64_t i = 0; i < x.k; ++i) {
    const int code = (int)std::nearbyint(x.at(r, i) * inverse) + row.zero_point;
    row.codes[(size_t)i] = code < 0 ? 0 : code > 255 ? 255 : code;
  }
  return row;
}

double activate(Activation a, double v) {
  switch (a) {
    case kRelu: return v > 0 ? v : 0;
    case kGelu: return 0.5 * v * std::erfc(-v / std::sqrt(2.0));
    case kGeluTanh: return v / (1 + std::exp(-2 * 0.7978845608028654 * (v + 0.044715 * v * v * v)));
    case kSilu: return v / (1 + std::exp(-v));
    default: return v;
  }
}

std::string shape(const KernelTable& t, const char* what, int64_t m, int64_t k, int64_t n, int extra) {
  return std::string(t.name) + " " + what + " m=" + std::to_string(m) + " k=" + std::to_string(k) +
         " n=" + std::to_string(n) + " case " + std::to_string(extra);
}

void test_linear(const KernelTable& t, int64_t m, int64_t k, int64_t n, int variant) {
  const DType dtype = (DType)(variant % 3);
  const Activation activation = (Activation)(variant % 5);
  const bool zero_points = variant % 2, with_bias = variant % 4 < 2, plain = variant % 7 == 3, ahead = variant % 5 == 4;
  Input x(dtype, m, k, variant % 3 ? 0 : 5);
  if (variant % 11 == 5 && m > 1 && k > 0 && dtype == kFloat32) x.f32[x.stride + k / 2] = INFINITY;
  Buffer<int8_t> weight(n * k), weight_zero_point(n);
  Buffer<float> scale(n), bias(n);
  Buffer<int32_t> column_sum(n);
  for (int64_t c = 0; c < n; ++c) {
    column_sum[c] = 0;
    for (int64_t i = 0; i < k; ++i) {
      weight[c * k + i] = (int8_t)(variant % 6 == 0 ? (c % 2 ? 127 : -128) : pick(-128, 127));
      column_sum[c] += weight[c * k + i];
    }
    weight_zero_point[c] = (int8_t)pick(-128, 127);
    scale[c] = 0.001f * (float)pick(1, 20);
    bias[c] = normal();
  }
  const int64_t panels = (n + 15) / 16, kp = round_up(k, 64);
  Buffer<int8_t> packed(panels * kp * 16, 64), back(n * k, 64);
  t.pack_weight(weight.data(), n, k, 0, panels, packed.data());
  t.unpack_weight(packed.data(), n, k, 0, panels, back.data());
  expect(packed.fenced() && back.fenced(), shape(t, "pack writes outside", m, k, n, variant));
  expect(n * k == 0 || std::memcmp(weight.data(), back.data(), (size_t)(n * k)) == 0,
         shape(t, "pack then unpack", m, k, n, variant));

  std::vector<NaiveRow> rows;
  for (int64_t r = 0; r < m; ++r) rows.push_back(naive_row(x, r));
  Buffer<uint8_t> codes(m * k, 64);
  Buffer<float> x_scale(m, 64);
  Buffer<int32_t> x_zero_point(m, 64);
  t.quantize_rows(x.data(), dtype, x.stride, m, k, codes.data(), k, x_scale.data(), x_zero_point.data());
  expect(codes.fenced() && x_scale.fenced() && x_zero_point.fenced(),
         shape(t, "quantize writes outside", m, k, n, variant));
  for (int64_t r = 0; r < m; ++r) {
    const NaiveRow& row = rows[(size_t)r];
    bool same = row.zero_point == x_zero_point[r] &&
                (row.scale == x_scale[r] || (std::isnan(row.scale) && std::isnan(x_scale[r])));
    for (int64_t i = 0; i < k; ++i) same = same && row.codes[(size_t)i] == codes[r * k + i];
    expect(same, shape(t, "codes", m, k, n, variant));
  }

  Output out(dtype, m * n);
  LinearArgs args = {};
  args.x = x.data();
  args.x_stride = x.stride;
  args.dtype = dtype;
  args.m = m;
  args.k = k;
  args.n = n;
  if (plain) {
    args.plain = weight.data();
  } else {
    args.packed = packed.data();
    args.column_sum = column_sum.data();
  }
  args.weight_scale = scale.data();
  args.weight_zero_point = zero_points ? weight_zero_point.data() : nullptr;
  args.bias = with_bias ? bias.data() : nullptr;
  args.activation = activation;
  args.out = out.data();
  Buffer<uint8_t> padded((m + kReadablePastEnd) * kp);
  if (ahead) {
    t.quantize_rows(x.data(), dtype, x.stride, m, k, padded.data(), kp, x_scale.data(), x_zero_point.data());
    args.codes = padded.data();
    args.x_scale = x_scale.data();
    args.x_zero_point = x_zero_point.data();
  }
  // Two row ranges and two column ranges, as threads would take them.
  const int64_t row_cut = variant % 3 ? m / 2 : m, col_cut = variant % 2 ? smaller(n, 64) : n;
  const int64_t row_ends[3] = {0, row_cut, m}, col_ends[3] = {0, col_cut, n};
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      if (row_ends[i] >= row_ends[i + 1] || col_ends[j] >= col_ends[j + 1]) continue;
      Aligned scratch(t.linear_scratch_bytes(args, row_ends[i + 1] - row_ends[i]));
      t.linear(args, row_ends[i], row_ends[i + 1], col_ends[j], col_ends[j + 1], scratch.p);
    }
  }
  expect(out.fenced(), shape(t, "linear writes outside", m, k, n, variant));
  for (int64_t r = 0; r < m; ++r) {
    const NaiveRow& row = rows[(size_t)r];
    for (int64_t c = 0; c < n; ++c) {
      int64_t sum = 0;
      for (int64_t i = 0; i < k; ++i) {
        sum += (int64_t)(row.codes[(size_t)i] - row.zero_point) *
               (weight[c * k + i] - (zero_points ? weight_zero_point[c] : 0));
      }
      float v = (float)sum * row.scale;
      v = v * scale[c];
      v = v + (with_bias ? bias[c] : 0.f);
      const float got = out.at(r * n + c);
      if (std::isnan(v)) {
        expect(std::isnan(got), shape(t, "NaN row", m, k, n, variant));
        continue;
      }
      const double want = activate(activation, v);
      // Activations may be off by a float32 rounding of what goes into them.
      const double curve = activation >= kGelu ? 1.2e-7 * std::fabs(v) : 0;
      const double allowed = std::fabs(want) * out.tolerance() * (activation >= kGelu ? 4 : 1) + curve + 1e-7;
      if (dtype == kFloat32 && activation < kGelu) expect(got == (float)want, shape(t, "sum", m, k, n, variant));
      else expect(std::fabs(got - want) <= allowed, shape(t, "output", m, k, n, variant));
    }
  }
}

void test_embedding(const KernelTable& t, int64_t rows, int64_t dim, int variant) {
  const DType dtype = (DType)(variant % 3);
  Buffer<int8_t> weight(rows * dim), zero_point(rows);
  Buffer<float> scale(rows);
  for (int64_t i = 0; i < rows * dim; ++i) weight[i] = (int8_t)pick(-128, 127);
  for (int64_t i = 0; i < rows; ++i) {
    zero_point[i] = (int8_t)pick(-128, 127);
    scale[i] = 0.01f * (float)pick(1, 9);
  }
  const int64_t count = 5;
  Buffer<int64_t> index(count);
  for (int64_t i = 0; i < count; ++i) index[i] = i == 0 ? rows - 1 : pick(0, rows - 1);
  Output out(dtype, count * dim);
  t.embedding(index.data(), count, weight.data(), dim, scale.data(), variant % 2 ? zero_point.data() : nullptr, dtype,
              out.data());
  expect(out.fenced(), shape(t, "embedding writes outside", rows, dim, 0, variant));
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < dim; ++i) {
      const float want =
          (float)(weight[index[r] * dim + i] - (variant % 2 ? zero_point[index[r]] : 0)) * scale[index[r]];
      expect(std::fabs(out.at(r * dim + i) - want) <= std::fabs(want) * out.tolerance(),
             shape(t, "embedding", rows, dim, 0, variant));
    }
  }
}

// A row's result does not depend on the number of rows.
void expect_rows_alone(const KernelTable& t, const FloatLinearArgs& args, Output& out, const std::string& what) {
  const int64_t size = args.dtype == kFloat32 ? 4 : 2, bytes = args.n * size;
  for (int64_t r = 0; r < args.m; ++r) {
    Output alone(args.dtype, args.n);
    FloatLinearArgs one = args;
    one.x = (const char*)args.x + r * args.x_stride * size;
    one.m = 1;
    one.out = alone.data();
    Aligned scratch(t.float_linear_scratch_bytes(one, 1));
    t.float_linear(one, 0, 1, 0, one.n, scratch.p);
    expect(std::memcmp((const char*)out.data() + r * bytes, alone.data(), (size_t)bytes) == 0, what);
  }
}

void test_float_linear(const KernelTable& t, int64_t m, int64_t k, int64_t n, int bits, int64_t group, int variant) {
  const DType dtype = (DType)(variant % 3);
  const int64_t words = bits == 16 ? 0 : (k * bits + 31) / 32, groups = bits == 16 ? 1 : k / group;
  const bool zero_points = bits != 16 && variant % 2;
  Input x(dtype, m, k, variant % 4 ? 0 : 3);
  Buffer<int32_t> packed(n * words);
  Buffer<uint16_t> half(bits == 16 ? n * k : 0);
  Buffer<float> scale(n * groups), bias(n);
  Buffer<int8_t> zero_point(n * groups);
  std::vector<double> weight((size_t)(n * k));
  for (int64_t i = 0; i < n * words; ++i) packed[i] = 0;
  for (int64_t i = 0; i < n * groups; ++i) {
    scale[i] = 0.01f * (float)pick(1, 9);
    zero_point[i] = (int8_t)(variant % 4 == 3 ? pick(-128, 127) : pick(-(1 << (bits == 4 ? 3 : 7)), 7));
  }
  for (int64_t c = 0; c < n; ++c) {
    bias[c] = normal();
    for (int64_t i = 0; i < k; ++i) {
      double v;
      if (bits == 16) {
        half[c * k + i] = to_half(normal());
        v = from_half(half[c * k + i]);
      } else {
        const int64_t q = pick(-(1 << (bits - 1)), (1 << (bits - 1)) - 1), per_word = 32 / bits;
        packed[c * words + i / per_word] |=
            (int32_t)((uint32_t)(q + (1 << (bits - 1))) << (bits * (i % per_word)));
        const int64_t g = c * groups + i / group;
        v = (double)(q - (zero_points ? zero_point[g] : 0)) * scale[g];
      }
      weight[(size_t)(c * k + i)] = v;
    }
  }
  Output out(dtype, m * n);
  FloatLinearArgs args = {};
  args.x = x.data();
  args.x_stride = x.stride;
  args.dtype = args.out_dtype = dtype;
  args.m = m;
  args.k = k;
  args.n = n;
  args.bits = bits;
  args.weight = bits == 16 ? (const void*)half.data() : (const void*)packed.data();
  args.row_bytes = bits == 16 ? k * 2 : words * 4;
  args.group_size = bits == 16 ? 0 : group;
  args.weight_scale = scale.data();
  args.weight_zero_point = zero_points ? zero_point.data() : nullptr;
  args.bias = variant % 3 ? bias.data() : nullptr;
  args.out = out.data();
  const int64_t row_ends[3] = {0, m / 2, m}, col_ends[3] = {0, smaller(n, 64), n};
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      if (row_ends[i] >= row_ends[i + 1] || col_ends[j] >= col_ends[j + 1]) continue;
      Aligned scratch(t.float_linear_scratch_bytes(args, row_ends[i + 1] - row_ends[i]));
      t.float_linear(args, row_ends[i], row_ends[i + 1], col_ends[j], col_ends[j + 1], scratch.p);
    }
  }
  expect(out.fenced(), shape(t, "float linear writes outside", m, k, n, variant));
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t c = 0; c < n; ++c) {
      double want = args.bias ? bias[c] : 0, magnitude = std::fabs(want);
      for (int64_t i = 0; i < k; ++i) {
        want += (double)x.at(r, i) * weight[(size_t)(c * k + i)];
        magnitude += std::fabs((double)x.at(r, i) * weight[(size_t)(c * k + i)]);
      }
      expect(std::fabs(out.at(r * n + c) - want) <= 2e-6 * magnitude + std::fabs(want) * out.tolerance() + 1e-7,
             shape(t, bits == 4 ? "int4" : bits == 8 ? "int8" : "half", m, k, n, variant));
    }
  }
  expect_rows_alone(t, args, out, shape(t, "float linear, a row alone", m, k, n, variant));
}

// A convolution of either kind, in two ranges of pixels (rows) and columns, as threads would take them.
void test_conv(const KernelTable& t, bool depthwise, int64_t channels, int64_t outputs, int64_t kernel, int variant) {
  ConvArgs a = {};
  a.batch = pick(1, 2);
  a.channels = channels;
  a.kernel_h = kernel;
  a.kernel_w = variant % 3 ? kernel : 1;
  a.stride_h = variant % 2 + 1;
  a.stride_w = variant % 4 == 1 ? 2 : 1;
  a.pad_h = pick(0, 2);
  a.pad_w = pick(0, 2);
  a.dilation_h = a.dilation_w = variant % 5 == 0 ? 2 : 1;
  a.height = pick(1, 9) + a.dilation_h * (a.kernel_h - 1);
  a.width = pick(1, 20) + a.dilation_w * (a.kernel_w - 1);
  a.out_height = (a.height + a.pad_h + pick(0, 1) - a.dilation_h * (a.kernel_h - 1) - 1) / a.stride_h + 1;
  a.out_width = (a.width + a.pad_w + pick(0, 1) - a.dilation_w * (a.kernel_w - 1) - 1) / a.stride_w + 1;
  a.x_zero = (uint8_t)pick(0, 255);
  const int64_t taps = a.kernel_h * a.kernel_w, depth = depthwise ? taps : taps * channels;
  const int64_t n = depthwise ? channels : outputs, padded = round_up(n, 64);
  const int64_t pixels = a.batch * a.out_height * a.out_width;
  Buffer<uint8_t> x(a.batch * a.height * a.width * channels), other(pixels * n);
  for (int64_t i = 0; i < a.batch * a.height * a.width * channels; ++i) x[i] = (uint8_t)pick(0, 255);
  for (int64_t i = 0; i < pixels * n; ++i) other[i] = (uint8_t)pick(0, 255);
  Buffer<int8_t> weight(n * depth), tiles(round_up(n, 16) * round_up(depth, 64)), rows(taps * padded);
  Buffer<int32_t> offset(padded);
  Buffer<float> scale(padded), bias(padded);
  for (int64_t c = 0; c < padded; ++c) {
    offset[c] = 0;
    scale[c] = 0.004f * (float)pick(1, 9);
    bias[c] = normal() * 50;
    for (int64_t i = 0; c < n && i < depth; ++i) {
      weight[c * depth + i] = (int8_t)pick(-128, 127);
      offset[c] += weight[c * depth + i] * a.x_zero;
    }
  }
  t.pack_weight(weight.data(), n, depth, 0, (n + 15) / 16, tiles.data());
  for (int64_t i = 0; i < taps; ++i) {
    for (int64_t c = 0; c < padded; ++c) rows[i * padded + c] = c < n && depthwise ? weight[c * depth + i] : (int8_t)0;
  }
  Output floats(kFloat32, pixels * n);
  Buffer<uint8_t> codes(pixels * n, 64);
  a.x = x.data();
  a.weight = depthwise ? rows.data() : tiles.data();
  FinishArgs& f = a.finish;
  f = {offset.data(), scale.data(), bias.data(), variant % 3 == 1 ? other.data() : nullptr, 0.5f, 7,
       (Finish)(variant % 4), 3.f, -5.f, 200.f, 5, true, variant % 4 == kFloat ? floats.data() : codes.data(), n};
  const int64_t rows_total = depthwise ? a.batch * a.out_height : pixels;
  const int64_t row_ends[3] = {0, rows_total / 2, rows_total}, col_ends[3] = {0, smaller(n, 64), n};
  for (int i = 0; i < 2; ++i) {
    if (row_ends[i] >= row_ends[i + 1]) continue;
    if (depthwise) {
      Aligned scratch(t.codes->depthwise_scratch_bytes(a));
      t.codes->depthwise(a, row_ends[i], row_ends[i + 1], scratch.p);
      continue;
    }
    Aligned scratch(t.codes->conv_scratch_bytes(a, row_ends[i + 1] - row_ends[i]));
    for (int j = 0; j < 2; ++j) {
      if (col_ends[j] < col_ends[j + 1]) {
        t.codes->conv(a, row_ends[i], row_ends[i + 1], col_ends[j], col_ends[j + 1], scratch.p);
      }
    }
  }
  const std::string what = shape(t, depthwise ? "depthwise" : "conv", pixels, depth, n, variant);
  expect(codes.fenced() && floats.fenced(), what + " writes outside");
  for (int64_t p = 0; p < pixels; ++p) {
    const int64_t sample = p / (a.out_height * a.out_width), oy = p / a.out_width % a.out_height, ox = p % a.out_width;
    for (int64_t c = 0; c < n; ++c) {
      int64_t sum = -offset[c];
      for (int64_t i = 0; i < depth; ++i) {
        const int64_t tap = depthwise ? i : i / channels, channel = depthwise ? c : i % channels;
        const int64_t y = oy * a.stride_h - a.pad_h + tap / a.kernel_w * a.dilation_h;
        const int64_t xx = ox * a.stride_w - a.pad_w + tap % a.kernel_w * a.dilation_w;
        const bool inside = y >= 0 && y < a.height && xx >= 0 && xx < a.width;
        const int64_t at = ((sample * a.height + y) * a.width + xx) * channels + channel;
        sum += (inside ? x[at] : a.x_zero) * weight[c * depth + i];
      }
      float v = (float)sum * scale[c];
      v = v + bias[c];
      if (f.other) v = v + (float)(f.other[p * n + c] - 7) * 0.5f;
      if (f.kind == kFloat) {
        expect(floats.at(p * n + c) == v, what);
        continue;
      }
      double real = v;
      if (f.kind == kHardswish) real = (double)v * std::fmin(std::fmax(v + 3.0, 0), 6) / 6 * 3;
      if (f.kind == kSwish) real = activate(kSilu, v) * 3;
      const double code = std::nearbyint(std::fmin(std::fmax(real, -5), 200)) + 5;
      expect(std::fabs(codes[p * n + c] - code) <= (f.kind == kClamp ? 0 : 1), what);
    }
  }
}

// The steps without a weight, on odd sizes; what they answer is compared with the specification by the Python tests.
void test_simple_steps(const KernelTable& t) {
  const int64_t channels = 19, height = 7, width = 9, count = 2 * height * width * channels;
  Buffer<uint8_t> a(count), b(count), out(count, 64);
  for (int64_t i = 0; i < count; ++i) a[i] = (uint8_t)pick(0, 255), b[i] = (uint8_t)pick(0, 255);
  t.codes->add({a.data(), b.data(), 0.5f, 0.25f, 3.f, 0.f, 255.f, 0, out.data()}, 0, count);
  for (int64_t i = 0; i < count; ++i) {
    expect(out[i] == std::nearbyint((float)a[i] * 0.5f + (float)b[i] * 0.25f + 3.f), std::string(t.name) + " add");
  }
  t.codes->multiply({a.data(), b.data(), height * width, channels, true, 3, 4, 0.01f, -9.f, 246.f, 9, out.data()}, 0,
                    2 * height * width);
  t.codes->max_pool({a.data(), 2, height, width, channels, 3, 2, 2, 3, 1, 0, 1, 2, 4, 3, out.data()}, 0, 8);
  expect(out.fenced(), std::string(t.name) + " writes outside");
  Buffer<int32_t> sums(channels, 64);
  t.codes->channel_sums(a.data(), height * width, channels, sums.data());
  expect(sums.fenced(), std::string(t.name) + " sums write outside");
  for (const int64_t planes : {1, 3, 5}) {
    const int64_t size = planes * 3 * 21;
    Buffer<float> image(size);
    Buffer<uint8_t> codes(size, 64);
    for (int64_t i = 0; i < size; ++i) image[i] = normal() * 50;
    const bool nan = t.codes->quantize({image.data(), planes, 3, 21, size, 63, 21, 1, 1.f, 90, codes.data()}, 0, 3);
    expect(!nan && codes.fenced(), std::string(t.name) + " quantize");
    for (int64_t i = 0; i < size; ++i) {
      const float code = std::fmin(std::fmax(std::nearbyint(image[i % planes * 63 + i / planes]) + 90, 0.f), 255.f);
      expect(codes[i] == code, std::string(t.name) + " image codes");
    }
  }
}

void test_codes(const KernelTable& t) {
  int variant = 0;
  for (const int64_t channels : {1, 3, 4, 16, 24, 64, 70}) {
    for (const int64_t kernel : {1, 3, 5}) {
      test_conv(t, false, channels, 5 + 30 * (variant % 5), kernel, variant);
      test_conv(t, true, channels, channels, kernel, variant + 1);
      variant += 1;
    }
  }
  test_simple_steps(t);
}

#include "attention_and_norm.inl"
#include "decoder_and_counts.inl"
#include "meetings.inl"

void test_table(const KernelTable& t) {
  test_codes(t);
  test_encoder_kernels(t);
  test_decoder_kernels(t);
  const int64_t ms[] = {0, 1, 2, 3, 4, 5, 7, 13, 17, 33, 50}, ks[] = {0, 1, 3, 4, 5, 15, 63, 64, 65, 100, 130, 200};
  const int64_t ns[] = {1, 7, 15, 16, 17, 33, 63, 64, 65, 100, 130};
  int variant = 0;
  for (const int64_t m : ms) {
    for (const int64_t k : ks) test_linear(t, m, k, ns[(variant * 7 + m) % 11], variant), ++variant;
    for (const int64_t n : ns) test_linear(t, m, ks[(variant * 5 + n) % 12], n, variant), ++variant;
  }
  // The largest sums of weights that are still met in one piece.
  test_linear(t, 8, 32768, 40, 0);
  for (int i = 0; i < 4; ++i) test_linear(t, 3, i % 2 ? 66000 : 33000, 5, 6 * i + i / 2);
  for (const int64_t dim : {1, 3, 4, 15, 16, 17, 40}) test_embedding(t, 9, dim, variant++);
  for (const int64_t m : {1, 2, 4, 5, 13, 25, 40}) {
    for (const int64_t n : {1, 15, 33, 70}) {
      test_float_linear(t, m, 256, n, 4, 64, variant++);
      test_float_linear(t, m, 384, n, 4, 128, variant++);
      test_float_linear(t, m, 160, n, 4, 32, variant++);
      test_float_linear(t, m, 131, n, 4, 131, variant++);
      test_float_linear(t, m, 396, n, 4, 132, variant++);
      // Spans that end with a group, within one, and before a rest.
      test_float_linear(t, m, 288, n, 4, 96, variant++);
      test_float_linear(t, m, 448, n, 8, 224, variant++);
      test_float_linear(t, m, 301, n, 4, 301, variant++);
      test_float_linear(t, m, 21, n, 4, 3, variant++);
      test_float_linear(t, m, 50, n, 8, 1, variant++);
      test_float_linear(t, m, 48, n, 8, 16, variant++);
      test_float_linear(t, m, 133, n, 8, 133, variant++);
      test_float_linear(t, m, 256, n, 8, 32, variant++);
      test_float_linear(t, m, 131, n, 16, 0, variant++);
      test_float_linear(t, m, 256, n, 16, 0, variant++);
    }
  }
}

}  // namespace

int main() {
  const std::string names = mono_quant_available_isas();
  std::istringstream list(names);
  for (std::string name; std::getline(list, name, ',');) {
    if (mono_quant_set_isa(name.c_str()) != 0) return 2;
    test_table(kernels());
    std::printf("%s\n", name.c_str());
#if defined(__x86_64__)
    if (name == "avx512vnni") {
      test_table(kAmxEmulatedKernels);
      std::printf("%s\n", kAmxEmulatedKernels.name);
    }
#endif
  }
  if (mono_quant_set_isa("no such set") == 0) return 3;
  test_meetings();
  test_meetings_in_halves();
  if (failures) std::fprintf(stderr, "%d failures\n", failures);
  return failures ? 1 : 0;
}
