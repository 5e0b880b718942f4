// run_codes: many steps on 8-bit codes in one call and one parallel region.
#include "code_run.h"

namespace mono_quant {
namespace {

// Channels-last memory for a value of a whole batch.
Tensor empty_value(const CodeValue& v, int64_t batch) {
  std::vector<int64_t> sizes = {batch, v.channels, v.height, v.width};
  std::vector<int64_t> strides = {v.channels * v.height * v.width, 1, v.width * v.channels, v.channels};
  if (v.flat) {
    sizes.resize(2);
    strides = {v.channels, 1};
  }
  AtenTensorHandle handle;
  const int32_t dtype = v.is_float ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Codes in channels-last order, copied where they lie otherwise.
Tensor channels_last(Tensor x, const CodeValue& v) {
  const bool dense = (v.channels == 1 || x.stride(1) == 1) && (v.width == 1 || x.stride(3) == v.channels) &&
                     (v.height == 1 || x.stride(2) == v.width * v.channels) &&
                     (x.size(0) == 1 || x.stride(0) == v.bytes());
  if (dense || x.numel() == 0) return x;
  Tensor copy = empty_value(v, x.size(0));
  uint8_t* to = copy.mutable_data<uint8_t>();
  const uint8_t* from = x.data<uint8_t>();
  for (int64_t n = 0; n < x.size(0); ++n) {
    for (int64_t h = 0; h < v.height; ++h) {
      for (int64_t w = 0; w < v.width; ++w) {
        const uint8_t* pixel = from + n * x.stride(0) + h * x.stride(2) + w * x.stride(3);
        for (int64_t c = 0; c < v.channels; ++c) *to++ = pixel[c * x.stride(1)];
      }
    }
  }
  return copy;
}

CodeValue input_value(Tensor& x, QuantizeArgs* image) {
  check(x.dim() == 4, "run_codes takes images [batch, channels, height, width]");
  CodeValue v;
  v.channels = x.size(1);
  v.height = x.size(2);
  v.width = x.size(3);
  v.is_float = x.dtype() == aoti_torch_dtype_float32();
  check(v.is_float || x.dtype() == aoti_torch_dtype_uint8(), "run_codes takes float32 images and uint8 codes");
  check_size(v);
  if (v.is_float) {
    *image = {nullptr, v.channels, v.height, v.width, x.stride(0), x.stride(1), x.stride(2), x.stride(3), 0, 0, nullptr};
  } else {
    x = channels_last(std::move(x), v);
  }
  v.base = const_cast<char*>(x.data<char>());
  return v;
}

// ---- run_codes(Tensor[] inputs, Tensor constants, str program) -> Tensor[]

void run_codes(StableIValue* stack, uint64_t, uint64_t) {
  std::vector<Tensor> inputs = take_tensors(stack[0]);
  Tensor constant_bytes = take_tensor(stack[1]);
  const CodeProgram program(take_string(stack[2]));
  check(kernels().codes != nullptr, "this instruction set has no kernels for codes");
  check((int64_t)inputs.size() == program.inputs, "run_codes got another number of inputs than its program has");
  check(constant_bytes.dtype() == aoti_torch_dtype_uint8() && constant_bytes.is_contiguous(),
        "the constants of run_codes must be contiguous bytes");
  const Constants constants = {constant_bytes.data<char>(), constant_bytes.numel()};
  check((uintptr_t)constants.data % 64 == 0, "the constants of run_codes must start at a multiple of 64 bytes");

  std::vector<CodeValue> values;
  std::vector<QuantizeArgs> images(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    values.push_back(input_value(inputs[i], &images[i]));
    check(inputs[i].size(0) == inputs[0].size(0), "the inputs of run_codes have different batch sizes");
  }
  const int64_t batch = inputs[0].size(0);
  for (size_t i = 0; i < program.steps.size(); ++i) {
    const CodeStep& step = program.steps[i];
    CodeValue made = step_value(step, values);
    made.born = made.last = (int64_t)i;
    values.push_back(made);
    values[(size_t)step.first].last = (int64_t)i;
    if (step.second >= 0) values[(size_t)step.second].last = (int64_t)i;
  }
  std::vector<Tensor> outputs;
  for (const int64_t number : program.outputs) {
    CodeValue& value = values[(size_t)number];
    outputs.push_back(empty_value(value, batch));
    value.base = outputs.back().mutable_data<char>();
  }
  bool nan = false;
  if (batch > 0) nan = Run(program, values, images, constants, batch).run();
  if (nan) fail("run_codes met NaN in its input; 8-bit codes have no NaN");
  stack[0] = release_tensors(outputs);
}

}  // namespace
}  // namespace mono_quant

STABLE_TORCH_LIBRARY_IMPL(mono_quant, CPU, m) { m.impl("run_codes", &mono_quant::run_codes); }
