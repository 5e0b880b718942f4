// Linear layers whose activations stay float.
#include "operands.h"

namespace mono_quant {
namespace {

// ---- linear_weight_only and linear_half

Tensor float_linear(Rows& x, FloatLinearArgs args, Tensor bias) {
  const Bias bias_values(std::move(bias), args.n);
  std::vector<int64_t> sizes = x.tensor.sizes();
  sizes.back() = args.n;
  Tensor out = Tensor::empty(sizes, x.tensor.dtype());
  args.x = x.tensor.data<void>();
  args.x_stride = x.stride;
  args.dtype = args.out_dtype = x.dtype;
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

}  // namespace
}  // namespace mono_quant

STABLE_TORCH_LIBRARY_IMPL(mono_quant, CPU, m) {
  m.impl("linear_weight_only", &mono_quant::linear_weight_only);
  m.impl("linear_half", &mono_quant::linear_half);
}
