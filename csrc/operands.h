// What the operators share: operands checked and brought into the form that the kernels rely on, and the division of an
// output among threads.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"
#include "tensor.h"

namespace mono_quant {

// x as rows: the leading dimensions must collapse into one stride and the last be contiguous; else a copy is made.
struct Rows {
  Tensor tensor;
  DType dtype;
  int64_t count, depth, stride;
};

inline bool collapses(const Tensor& x) {
  if (x.size(-1) > 1 && x.stride(-1) != 1) return false;
  int64_t expected = -1;
  for (int64_t i = x.dim() - 2; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (expected >= 0 && x.stride(i) != expected) return false;
    expected = x.stride(i) * x.size(i);
  }
  return true;
}

inline Rows as_rows(Tensor x, const char* name) {
  Rows rows;
  rows.dtype = float_type(x.dtype(), name);
  check(x.dim() >= 1, "the input must have at least one dimension");
  rows.depth = x.size(-1);
  rows.count = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows.count *= x.size(i);
  if (rows.count > 0 && !collapses(x)) x.make_contiguous();
  rows.stride = rows.depth;
  for (int64_t i = x.dim() - 2; i >= 0; --i) {
    if (x.size(i) != 1) {
      rows.stride = x.stride(i);
      break;
    }
  }
  rows.tensor = std::move(x);
  return rows;
}

inline void expect(Tensor& t, const char* name, int32_t dtype, int64_t numel) {
  if (t.dtype() != dtype) fail(std::string(name) + " has the wrong dtype");
  if (t.numel() != numel) {
    fail(std::string(name) + " has " + std::to_string(t.numel()) + " elements, expected " + std::to_string(numel));
  }
  t.make_contiguous();
}

// A bias of any float dtype as float32.
class Bias {
 public:
  Bias(Tensor bias, int64_t n) : tensor_(std::move(bias)) {
    if (!tensor_) return;
    if (tensor_.numel() != n) {
      fail("bias has " + std::to_string(tensor_.numel()) + " elements, expected " + std::to_string(n));
    }
    tensor_.make_contiguous();
    const int32_t dtype = tensor_.dtype();
    if (dtype == aoti_torch_dtype_float32()) {
      data_ = tensor_.data<float>();
      return;
    }
    converted_.resize((size_t)n);
    if (dtype == aoti_torch_dtype_float64()) {
      for (int64_t i = 0; i < n; ++i) converted_[i] = (float)tensor_.data<double>()[i];
    } else if (float_type(dtype, "bias") == kBFloat16) {
      for (int64_t i = 0; i < n; ++i) converted_[i] = (float)tensor_.data<torch::headeronly::BFloat16>()[i];
    } else {
      for (int64_t i = 0; i < n; ++i) converted_[i] = (float)tensor_.data<torch::headeronly::Half>()[i];
    }
    data_ = converted_.data();
  }
  const float* data() const { return data_; }

 private:
  Tensor tensor_;
  std::vector<float> converted_;
  const float* data_ = nullptr;
};

inline Activation activation_from(const std::string& name) {
  if (name == "none") return kNone;
  if (name == "relu") return kRelu;
  if (name == "gelu") return kGelu;
  if (name == "gelu_tanh") return kGeluTanh;
  if (name == "silu") return kSilu;
  fail("unknown activation '" + name + "'; expected none, relu, gelu, gelu_tanh or silu");
}

inline void expect_depth(const Rows& x, int64_t k) {
  if (x.depth != k) {
    fail("the input has " + std::to_string(x.depth) + " features, the weight expects " + std::to_string(k));
  }
}

// A grid of row ranges x column ranges. Every range of columns reads all its rows' inputs (and quantizes them), every range
// of rows reads all its columns' weights, often from memory: the division is the one with the least of both.
struct Grid {
  static constexpr int64_t kRangeRows = 24;  // fewer are not worth a range of their own
  int64_t row_parts = 1, col_parts = 1, rows, cols;
  int64_t m, n;
  Grid(int64_t m, int64_t n, int64_t threads) : m(m), n(n) {
    double least = 0;
    for (int64_t parts = 1; parts <= smaller(threads, larger(1, m / kRangeRows)); ++parts) {
      const int64_t others = larger(1, smaller(threads / parts, (n + 63) / 64));
      // Nanoseconds for each unit of depth, as measured: 0.13 to quantize an input, 0.04 to fetch a weight; and what
      // the threads that get nothing would have done.
      const double idle = (double)threads / (double)(parts * others);
      const double cost = idle * (0.13 * (double)m / (double)parts + 0.04 * (double)n / (double)others);
      if (parts > 1 && cost >= least) continue;
      least = cost;
      row_parts = parts;
      col_parts = others;
    }
    rows = (m + row_parts - 1) / row_parts;
    cols = round_up((n + col_parts - 1) / col_parts, 64);
  }
  int64_t tasks() const { return row_parts * col_parts; }
  template <class Part>
  void run(const Part& part) const {
    run_tasks(tasks(), [&](int64_t i) { this->part(i, part); });
  }
  template <class Part>
  void part(int64_t i, const Part& part) const {
    const int64_t r = i / col_parts * rows, c = i % col_parts * cols;
    const int64_t row_end = smaller(m, r + rows), col_end = smaller(n, c + cols);
    if (r < row_end && c < col_end) part(r, row_end, c, col_end);
  }
};

}  // namespace mono_quant
