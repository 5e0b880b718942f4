// CPU implementations of the operators declared in Python (mono_quant/ops): they check what the kernels rely on,
// allocate the result, choose the number of threads and call the kernel table in use.
#include "isa.h"
#include "kernels.h"
#include "parallel.h"
#include "tensor.h"

namespace mono_quant {
namespace {

// x as rows: the leading dimensions must collapse into one stride and the last be contiguous; else a copy is made.
struct Rows {
  Tensor tensor;
  DType dtype;
  int64_t count, depth, stride;
};

bool collapses(const Tensor& x) {
  if (x.size(-1) > 1 && x.stride(-1) != 1) return false;
  int64_t expected = -1;
  for (int64_t i = x.dim() - 2; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (expected >= 0 && x.stride(i) != expected) return false;
    expected = x.stride(i) * x.size(i);
  }
  return true;
}

Rows as_rows(Tensor x, const char* name) {
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

void expect(Tensor& t, const char* name, int32_t dtype, int64_t numel) {
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

Activation activation_from(const std::string& name) {
  if (name == "none") return kNone;
  if (name == "relu") return kRelu;
  if (name == "gelu") return kGelu;
  if (name == "gelu_tanh") return kGeluTanh;
  if (name == "silu") return kSilu;
  fail("unknown activation '" + name + "'; expected none, relu, gelu, gelu_tanh or silu");
}

// A grid of row ranges x column ranges.
struct Grid {
  int64_t row_parts, col_parts, rows, cols;
  int64_t m, n;
  Grid(int64_t m, int64_t n, int64_t threads) : m(m), n(n) {
    row_parts = smaller(threads, larger(1, m / 24));
    col_parts = larger(1, smaller(threads / row_parts, (n + 63) / 64));
    rows = (m + row_parts - 1) / row_parts;
    cols = round_up((n + col_parts - 1) / col_parts, 64);
  }
  int64_t tasks() const { return row_parts * col_parts; }
  template <class Part>
  void run(const Part& part) const {
    run_tasks(tasks(), [&](int64_t i) {
      const int64_t r = i / col_parts * rows, c = i % col_parts * cols;
      const int64_t row_end = smaller(m, r + rows), col_end = smaller(n, c + cols);
      if (r < row_end && c < col_end) part(r, row_end, c, col_end);
    });
  }
};

void run_linear(LinearArgs args) {
  if (args.m == 0 || args.n == 0) return;
  const KernelTable& table = kernels();
  const double products = (double)args.m * (double)args.n * (double)args.k;
  const double weight_bytes = (double)args.n * (double)args.k;
  const Grid grid(args.m, args.n, worthwhile_threads(products / table.speed + weight_bytes / 60e3));

  // With many column ranges each would quantize the same rows again: do it once, before.
  const int64_t kp = round_up(args.k, kPanelDepth);
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
  const bool ahead = grid.col_parts >= 4 && args.m * args.k > 32768;
  const ThreadScratch codes(ahead ? (args.m + kReadablePastEnd) * kp : 0);
  if (ahead) {
    scale.resize((size_t)args.m);
    zero_point.resize((size_t)args.m);
    uint8_t* out = static_cast<uint8_t*>(codes.get());
    const int64_t parts = smaller(args.m, grid.tasks()), step = (args.m + parts - 1) / parts;
    const int64_t element = args.dtype == kFloat32 ? 4 : 2;
    run_tasks(parts, [&](int64_t i) {
      const int64_t first = i * step, count = smaller(step, args.m - first);
      if (count <= 0) return;
      table.quantize_rows((const char*)args.x + first * args.x_stride * element, args.dtype, args.x_stride, count,
                          args.k, out + first * kp, kp, scale.data() + first, zero_point.data() + first);
    });
    args.codes = out;
    args.x_scale = scale.data();
    args.x_zero_point = zero_point.data();
  }
  grid.run([&](int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
    const ThreadScratch scratch(table.linear_scratch_bytes(args, row_end - row_begin));
    table.linear(args, row_begin, row_end, col_begin, col_end, scratch.get());
  });
}

// ---- quantize_rows(Tensor x) -> (Tensor codes, Tensor scale, Tensor zero_point)

void quantize_rows(StableIValue* stack, uint64_t, uint64_t) {
  const Rows x = as_rows(take_tensor(stack[0]), "the input");
  std::vector<int64_t> sizes = x.tensor.sizes();
  Tensor codes = Tensor::empty(sizes, aoti_torch_dtype_uint8());
  sizes.pop_back();
  Tensor scale = Tensor::empty(sizes, aoti_torch_dtype_float32());
  Tensor zero_point = Tensor::empty(sizes, aoti_torch_dtype_int32());
  if (x.count > 0) {
    const KernelTable& table = kernels();
    const char* from = x.tensor.data<char>();
    uint8_t* c = codes.mutable_data<uint8_t>();
    float* s = scale.mutable_data<float>();
    int32_t* z = zero_point.mutable_data<int32_t>();
    const int64_t element = x.dtype == kFloat32 ? 4 : 2;
    const int64_t parts = smaller(x.count, worthwhile_threads((double)x.count * (double)x.depth / 3e3));
    const int64_t step = (x.count + parts - 1) / parts;
    run_tasks(parts, [&](int64_t i) {
      const int64_t first = i * step, count = smaller(step, x.count - first);
      if (count <= 0) return;
      table.quantize_rows(from + first * x.stride * element, x.dtype, x.stride, count, x.depth, c + first * x.depth,
                          x.depth, s + first, z + first);
    });
  }
  stack[0] = codes.release();
  stack[1] = scale.release();
  stack[2] = zero_point.release();
}

// ---- pack_weight(Tensor weight) -> Tensor; unpack_weight(Tensor packed, int out_features, int in_features) -> Tensor

void pack_weight(StableIValue* stack, uint64_t, uint64_t) {
  Tensor weight = take_tensor(stack[0]);
  check(weight.dim() == 2 && weight.dtype() == aoti_torch_dtype_int8(), "pack_weight needs an int8 matrix");
  weight.make_contiguous();
  const int64_t n = weight.size(0), k = weight.size(1);
  const int64_t panels = (n + 15) / 16;
  Tensor packed = Tensor::empty({panels, (k + 63) / 64, 16, 16, 4}, aoti_torch_dtype_int8());
  if (packed.numel() > 0) {
    const KernelTable& table = kernels();
    const int8_t* from = weight.data<int8_t>();
    int8_t* to = packed.mutable_data<int8_t>();
    const int64_t parts = smaller(panels, worthwhile_threads((double)n * (double)k / 5e3));
    const int64_t step = (panels + parts - 1) / parts;
    run_tasks(parts, [&](int64_t i) { table.pack_weight(from, n, k, i * step, smaller(panels, (i + 1) * step), to); });
  }
  stack[0] = packed.release();
}

void expect_packed(Tensor& packed, int64_t n, int64_t k) {
  check(n >= 0 && k >= 0, "negative size of a packed weight");
  check(packed.dim() == 5 && packed.size(2) == 16 && packed.size(3) == 16 && packed.size(4) == 4 &&
            packed.size(0) == (n + 15) / 16 && packed.size(1) == (k + 63) / 64,
        "the packed weight does not fit the layer's sizes");
  expect(packed, "the packed weight", aoti_torch_dtype_int8(), packed.numel());
}

void unpack_weight(StableIValue* stack, uint64_t, uint64_t) {
  Tensor packed = take_tensor(stack[0]);
  const int64_t n = take_int(stack[1]), k = take_int(stack[2]);
  expect_packed(packed, n, k);
  Tensor weight = Tensor::empty({n, k}, aoti_torch_dtype_int8());
  if (weight.numel() > 0) {
    kernels().unpack_weight(packed.data<int8_t>(), n, k, 0, (n + 15) / 16, weight.mutable_data<int8_t>());
  }
  stack[0] = weight.release();
}

// ---- linear_dynamic and linear_dynamic_packed

Tensor dynamic_linear(Rows& x, LinearArgs args, Tensor& weight_scale, Tensor& weight_zero_point, Tensor& bias) {
  expect(weight_scale, "weight_scale", aoti_torch_dtype_float32(), args.n);
  if (weight_zero_point) expect(weight_zero_point, "weight_zero_point", aoti_torch_dtype_int8(), args.n);
  const Bias bias_values(std::move(bias), args.n);
  std::vector<int64_t> sizes = x.tensor.sizes();
  sizes.back() = args.n;
  Tensor out = Tensor::empty(sizes, x.tensor.dtype());
  args.x = x.tensor.data<void>();
  args.x_stride = x.stride;
  args.dtype = x.dtype;
  args.m = x.count;
  args.k = x.depth;
  args.weight_scale = weight_scale.data<float>();
  args.weight_zero_point = weight_zero_point ? weight_zero_point.data<int8_t>() : nullptr;
  args.bias = bias_values.data();
  args.out = out.mutable_data<void>();
  run_linear(args);
  return out;
}

void expect_depth(const Rows& x, int64_t k) {
  if (x.depth != k) {
    fail("the input has " + std::to_string(x.depth) + " features, the weight expects " + std::to_string(k));
  }
}

void linear_dynamic(StableIValue* stack, uint64_t, uint64_t) {
  Tensor input = take_tensor(stack[0]), weight = take_tensor(stack[1]), weight_scale = take_tensor(stack[2]);
  Tensor weight_zero_point = take_optional_tensor(stack[3]), bias = take_optional_tensor(stack[4]);
  const std::string activation = take_string(stack[5]);
  Rows x = as_rows(std::move(input), "the input");
  check(weight.dim() == 2, "the weight must be a matrix");
  expect_depth(x, weight.size(1));
  expect(weight, "weight", aoti_torch_dtype_int8(), weight.numel());
  LinearArgs args = {};
  args.n = weight.size(0);
  args.plain = weight.data<int8_t>();
  args.activation = activation_from(activation);
  stack[0] = dynamic_linear(x, args, weight_scale, weight_zero_point, bias).release();
}

void linear_dynamic_packed(StableIValue* stack, uint64_t, uint64_t) {
  Tensor input = take_tensor(stack[0]), packed = take_tensor(stack[1]), column_sum = take_tensor(stack[2]);
  Tensor weight_scale = take_tensor(stack[3]);
  Tensor weight_zero_point = take_optional_tensor(stack[4]), bias = take_optional_tensor(stack[5]);
  const int64_t n = take_int(stack[6]);
  const std::string activation = take_string(stack[7]);
  Rows x = as_rows(std::move(input), "the input");
  expect_packed(packed, n, x.depth);
  expect(column_sum, "column_sum", aoti_torch_dtype_int32(), n);
  LinearArgs args = {};
  args.n = n;
  args.packed = packed.data<int8_t>();
  args.column_sum = column_sum.data<int32_t>();
  args.activation = activation_from(activation);
  stack[0] = dynamic_linear(x, args, weight_scale, weight_zero_point, bias).release();
}

// ---- linear_weight_only and linear_half

Tensor float_linear(Rows& x, FloatLinearArgs args, Tensor bias) {
  const Bias bias_values(std::move(bias), args.n);
  std::vector<int64_t> sizes = x.tensor.sizes();
  sizes.back() = args.n;
  Tensor out = Tensor::empty(sizes, x.tensor.dtype());
  args.x = x.tensor.data<void>();
  args.x_stride = x.stride;
  args.dtype = x.dtype;
  args.m = x.count;
  args.k = x.depth;
  args.bias = bias_values.data();
  args.out = out.mutable_data<void>();
  if (args.m == 0 || args.n == 0) return out;
  const KernelTable& table = kernels();
  const double products = (double)args.m * (double)args.n * (double)args.k;
  const double decoded = (double)args.n * (double)args.k;
  const Grid grid(args.m, args.n, worthwhile_threads((products + 3 * decoded) / (table.speed / 4)));
  grid.run([&](int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
    const ThreadScratch scratch(table.float_linear_scratch_bytes(args, row_end - row_begin));
    table.float_linear(args, row_begin, row_end, col_begin, col_end, scratch.get());
  });
  return out;
}

void linear_weight_only(StableIValue* stack, uint64_t, uint64_t) {
  Tensor input = take_tensor(stack[0]), weight = take_tensor(stack[1]), weight_scale = take_tensor(stack[2]);
  Tensor weight_zero_point = take_optional_tensor(stack[3]), bias = take_optional_tensor(stack[4]);
  const int64_t k = take_int(stack[5]), bits = take_int(stack[6]), group_size = take_int(stack[7]);
  Rows x = as_rows(std::move(input), "the input");
  expect_depth(x, k);
  check(bits == 4 || bits == 8, "weight-only weights have 4 or 8 bits");
  const bool whole_rows = group_size == k || k == 0;
  if (!whole_rows && (group_size <= 0 || k % group_size != 0)) {
    fail("group size " + std::to_string(group_size) + " does not divide " + std::to_string(k) + " inputs");
  }
  const int64_t words = (k * bits + 31) / 32;
  check(weight.dim() == 2 && weight.size(1) == words, "the packed weight does not fit in_features and bits");
  // Without inputs there is no group to scale, whatever the shape of the scales.
  const int64_t n = weight.size(0), groups = k == 0 ? 0 : whole_rows ? 1 : k / group_size;
  expect(weight, "weight_packed", aoti_torch_dtype_int32(), n * words);
  FloatLinearArgs args = {};
  args.n = n;
  args.bits = (int)bits;
  args.weight = weight.data<void>();
  args.row_bytes = words * 4;
  args.group_size = whole_rows ? larger(k, 1) : group_size;
  expect(weight_scale, "weight_scale", aoti_torch_dtype_float32(), k == 0 ? weight_scale.numel() : n * groups);
  args.weight_scale = weight_scale.data<float>();
  if (weight_zero_point) {
    const int64_t count = k == 0 ? weight_zero_point.numel() : n * groups;
    expect(weight_zero_point, "weight_zero_point", aoti_torch_dtype_int8(), count);
    args.weight_zero_point = weight_zero_point.data<int8_t>();
  }
  stack[0] = float_linear(x, args, std::move(bias)).release();
}

void linear_half(StableIValue* stack, uint64_t, uint64_t) {
  Tensor input = take_tensor(stack[0]), weight = take_tensor(stack[1]), bias = take_optional_tensor(stack[2]);
  Rows x = as_rows(std::move(input), "the input");
  check(weight.dim() == 2, "the weight must be a matrix");
  expect_depth(x, weight.size(1));
  expect(weight, "weight", aoti_torch_dtype_float16(), weight.numel());
  FloatLinearArgs args = {};
  args.n = weight.size(0);
  args.bits = 16;
  args.weight = weight.data<void>();
  args.row_bytes = x.depth * 2;
  stack[0] = float_linear(x, args, std::move(bias)).release();
}

// ---- embedding(Tensor indices, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, ScalarType dtype)

void embedding(StableIValue* stack, uint64_t, uint64_t) {
  Tensor indices = take_tensor(stack[0]), weight = take_tensor(stack[1]), scale = take_tensor(stack[2]);
  Tensor zero_point = take_optional_tensor(stack[3]);
  const int32_t dtype = torch::stable::detail::to<int32_t>(stack[4]);
  const DType out_type = float_type(dtype, "the output dtype");
  check(weight.dim() == 2, "the weight must be a matrix");
  const int64_t rows = weight.size(0), dim = weight.size(1);
  expect(weight, "weight", aoti_torch_dtype_int8(), rows * dim);
  expect(scale, "weight_scale", aoti_torch_dtype_float32(), rows);
  if (zero_point) expect(zero_point, "weight_zero_point", aoti_torch_dtype_int8(), rows);
  indices.make_contiguous();
  const int64_t count = indices.numel();
  std::vector<int64_t> widened;
  const int64_t* index = nullptr;
  if (indices.dtype() == aoti_torch_dtype_int64()) {
    index = indices.data<int64_t>();
  } else {
    check(indices.dtype() == aoti_torch_dtype_int32(), "indices must be int64 or int32");
    widened.assign(indices.data<int32_t>(), indices.data<int32_t>() + count);
    index = widened.data();
  }
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] < 0 || index[i] >= rows) {
      fail("index " + std::to_string(index[i]) + " is out of range for an embedding of " + std::to_string(rows) +
           " rows");
    }
  }
  std::vector<int64_t> sizes = indices.sizes();
  sizes.push_back(dim);
  Tensor out = Tensor::empty(sizes, dtype);
  if (out.numel() > 0) {
    const KernelTable& table = kernels();
    const int64_t element = out_type == kFloat32 ? 4 : 2;
    const int8_t* w = weight.data<int8_t>();
    const float* s = scale.data<float>();
    const int8_t* z = zero_point ? zero_point.data<int8_t>() : nullptr;
    char* to = out.mutable_data<char>();
    const int64_t parts = smaller(count, worthwhile_threads((double)count * (double)dim / 5e3));
    const int64_t step = (count + parts - 1) / parts;
    run_tasks(parts, [&](int64_t i) {
      const int64_t first = i * step, part = smaller(step, count - first);
      if (part > 0) table.embedding(index + first, part, w, dim, s, z, out_type, to + first * dim * element);
    });
  }
  stack[0] = out.release();
}

}  // namespace
}  // namespace mono_quant

STABLE_TORCH_LIBRARY_IMPL(mono_quant, CPU, m) {
  m.impl("quantize_rows", &mono_quant::quantize_rows);
  m.impl("pack_weight", &mono_quant::pack_weight);
  m.impl("unpack_weight", &mono_quant::unpack_weight);
  m.impl("linear_dynamic", &mono_quant::linear_dynamic);
  m.impl("linear_dynamic_packed", &mono_quant::linear_dynamic_packed);
  m.impl("embedding", &mono_quant::embedding);
  m.impl("linear_weight_only", &mono_quant::linear_weight_only);
  m.impl("linear_half", &mono_quant::linear_half);
}
