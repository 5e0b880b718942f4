// The dynamic int8 linear layer on plain and on packed weights, and packing itself.
#include "operands.h"
#include "packed_layer.h"

namespace mono_quant {
namespace {

// Fewer inputs are quantized again by each thread before the others would have met.
constexpr int64_t kWorthSharing = 8192;

void run_linear(LinearArgs args) {
  if (args.m == 0 || args.n == 0) return;
  const KernelTable& table = kernels();
  const double products = (double)args.m * (double)args.n * (double)args.k;
  const double weight_bytes = (double)args.n * (double)args.k;
  // Between two calls the other layers of a model push the weight out of the caches: it comes from memory.
  const Grid grid(args.m, args.n, worthwhile_threads(products / table.speed + weight_bytes / 25e3));

  auto part = [&](int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
    const ThreadScratch scratch(table.linear_scratch_bytes(args, row_end - row_begin));
    table.linear(args, row_begin, row_end, col_begin, col_end, scratch.get());
  };
  if (grid.col_parts == 1 || args.m * args.k <= kWorthSharing) return grid.run(part);

  // Ranges of columns read the same rows: all threads quantize these once, before.
  Carver size(nullptr);
  size.codes(args.m, args.k);
  const ThreadScratch memory(size.bytes());
  const Codes codes = Carver((char*)memory.get()).codes(args.m, args.k);
  args.codes = codes.codes;
  args.x_scale = codes.scale;
  args.x_zero_point = codes.zero_point;
  const int64_t kp = round_up(args.k, kPanelDepth), parts = smaller(args.m, grid.tasks());
  const int64_t step = (args.m + parts - 1) / parts, element = args.dtype == kFloat32 ? 4 : 2;
  Meetings meetings(2);
  run_tasks(grid.tasks(), [&](int64_t) {
    meetings.share(0, parts, [&](int64_t i) {
      const int64_t first = i * step, count = smaller(step, args.m - first);
      if (count <= 0) return;
      table.quantize_rows((const char*)args.x + first * args.x_stride * element, args.dtype, args.x_stride, count,
                          args.k, codes.codes + first * kp, kp, codes.scale + first, codes.zero_point + first);
    });
    meetings.share(1, grid.tasks(), [&](int64_t i) { grid.part(i, part); });
  });
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

}  // namespace
}  // namespace mono_quant

STABLE_TORCH_LIBRARY_IMPL(mono_quant, CPU, m) {
  m.impl("pack_weight", &mono_quant::pack_weight);
  m.impl("unpack_weight", &mono_quant::unpack_weight);
  m.impl("linear_dynamic", &mono_quant::linear_dynamic);
  m.impl("linear_dynamic_packed", &mono_quant::linear_dynamic_packed);
}
