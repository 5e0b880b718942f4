// Operators on rows: quantizing them, and looking them up in an int8 table.
#include "operands.h"

namespace mono_quant {
namespace {

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
  m.impl("embedding", &mono_quant::embedding);
}
