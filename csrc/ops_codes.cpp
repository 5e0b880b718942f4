// run_codes: many steps on 8-bit codes in one call and one parallel region.
//
// Samples go through all steps in small groups, so that what a step answers is still in the cache when the next one reads
// it, and memory for activations does not grow with the batch. Threads take pieces of a step from a counter and wait for
// each other between steps by spinning, which costs well under a microsecond where a parallel region costs 5 to 13. A
// thread that comes late, or a task that runs after the others, finds nothing left to do: no number of threads is relied
// on.
#include <sched.h>

#include <atomic>
#include <memory>

#include "code_program.h"
#include "isa.h"
#include "parallel.h"

namespace mono_quant {
namespace {

struct Constants {
  const char* data;
  int64_t bytes;
  template <typename T>
  const T* at(int64_t offset, int64_t count) const {
    const bool inside = offset >= 0 && offset % 64 == 0 && count >= 0 && offset + count * (int64_t)sizeof(T) <= bytes;
    check(inside, "a step of run_codes reads beyond the constants");
    return reinterpret_cast<const T*>(data + offset);
  }
};

// A step for a group of samples, and how its work is divided.
struct Stage {
  CodeStep step;
  const CodeValue* x;
  const CodeValue* other;
  const CodeValue* out;
  ConvArgs conv;
  // Pieces of `rows` by `cols` for a full group; of what they are rows depends on the kind.
  int64_t rows = 1, cols = 1;
};

ConvArgs conv_args(const CodeStep& s, const CodeValue& x, const CodeValue& out, const Constants& constants) {
  ConvArgs a = {};
  a.height = x.height;
  a.width = x.width;
  a.channels = x.channels;
  int64_t* const geometry[] = {&a.kernel_h, &a.kernel_w, &a.stride_h,   &a.stride_w,
                               &a.pad_h,    &a.pad_w,    &a.dilation_h, &a.dilation_w};
  for (int i = 0; i < 8; ++i) *geometry[i] = s.integer(1 + i);
  a.out_height = out.height;
  a.out_width = out.width;
  a.x_zero = (uint8_t)s.integer(9);
  const int64_t taps = a.kernel_h * a.kernel_w, padded = round_up(out.channels, 64);
  const int64_t weights = s.kind == kDepthwiseStep
                              ? taps * padded
                              : (out.channels + 15) / 16 * 16 * round_up(taps * x.channels, kPanelDepth);
  check(taps * x.channels <= 65536, "a convolution's sums may not fit 32 bits");
  a.weight = constants.at<int8_t>(s.integer(10), weights);
  FinishArgs& f = a.finish;
  f.offset = constants.at<int32_t>(s.integer(11), padded);
  f.scale = constants.at<float>(s.integer(12), padded);
  f.bias = constants.at<float>(s.integer(13), padded);
  check(s.integer(14) >= kClamp && s.integer(14) <= kFloat, "a convolution's activation is unknown");
  f.kind = (Finish)s.integer(14);
  f.inverse = s.real(15);
  f.low = s.real(16);
  f.high = s.real(17);
  f.zero = (int32_t)s.integer(18);
  f.bounded = s.integer(19) != 0;
  f.other_scale = s.real(20);
  f.other_zero = (int32_t)s.integer(21);
  f.outputs = out.channels;
  return a;
}

class Run {
 public:
  // `images`: sizes and strides of the inputs that are float.
  Run(const CodeProgram& program, std::vector<CodeValue>& values, const std::vector<QuantizeArgs>& images,
      const Constants& constants, int64_t batch)
      : table_(kernels()), codes_(*table_.codes), constants_(constants), values_(values), images_(images),
        batch_(batch) {
    const int64_t per_sample = place_values(values);
    group_ = smaller(batch, larger(1, kGroupBytes / larger(per_sample, 1)));
    double products = 0;
    for (const CodeStep& step : program.steps) products += add_stage(step);
    threads_ = worthwhile_threads((double)batch * products / table_.speed);
    for (Stage& stage : stages_) divide(stage);
    memory_ = reinterpret_cast<char*>(aligned(per_sample * group_));
  }

  // Answers whether a value to be quantized was NaN.
  bool run() {
    const int64_t groups = (batch_ + group_ - 1) / group_, count = groups * (int64_t)stages_.size();
    counters_ = std::make_unique<Counter[]>((size_t)count);
    run_tasks(threads_, [&](int64_t) {
      for (int64_t i = 0; i < count; ++i) work(i);
    });
    return nan_.load();
  }

 private:
  static constexpr int64_t kGroupBytes = 1536 * 1024;
  struct alignas(128) Counter {
    std::atomic<int64_t> next{0}, done{0};
  };

  double add_stage(const CodeStep& step) {
    Stage stage = {};
    stage.step = step;
    stage.x = &values_[(size_t)step.first];
    stage.other = step.second < 0 ? nullptr : &values_[(size_t)step.second];
    stage.out = &values_[(size_t)step.output];
    double products = (double)stage.out->bytes();
    if (step.kind == kConvStep || step.kind == kDepthwiseStep) {
      stage.conv = conv_args(step, *stage.x, *stage.out, constants_);
      const double depth = (double)(stage.conv.kernel_h * stage.conv.kernel_w) *
                           (step.kind == kConvStep ? (double)stage.x->channels : 8.0);
      products *= 8 + depth;
    }
    stages_.push_back(stage);
    return products;
  }

  // Pieces small enough to share evenly, large enough that each is worth its counting.
  void divide(Stage& stage) const {
    const CodeValue& out = *stage.out;
    const int64_t pieces = threads_ == 1 ? 1 : 4 * threads_;
    if (stage.step.kind == kConvStep) {
      const int64_t pixels = group_ * out.height * out.width, columns = (out.channels + 63) / 64;
      const int64_t row_parts = smaller(pieces, larger(1, pixels / 48));
      const int64_t col_parts = smaller(columns, (pieces + row_parts - 1) / row_parts);
      stage.rows = larger(12, round_up((pixels + row_parts - 1) / row_parts, 12));
      stage.cols = (columns + col_parts - 1) / col_parts * 64;
    } else if (stage.step.kind == kGlobalAverageStep) {
      stage.rows = 1;
    } else {
      const int64_t lines = group_ * out.height;
      stage.rows = larger(1, (lines + pieces - 1) / pieces);
    }
  }

  const char* sample(const CodeValue& v, int64_t first) const {
    return v.base ? v.base + first * v.bytes() : memory_ + v.offset * group_;
  }

  void work(int64_t index) {
    const int64_t stage_count = (int64_t)stages_.size(), first = index / stage_count * group_;
    const int64_t samples = smaller(group_, batch_ - first);
    const Stage& stage = stages_[(size_t)(index % stage_count)];
    const int64_t lines = stage.step.kind == kGlobalAverageStep ? samples
                          : stage.step.kind == kConvStep        ? samples * stage.out->height * stage.out->width
                                                                : samples * stage.out->height;
    const int64_t row_parts = (lines + stage.rows - 1) / stage.rows;
    const int64_t columns = stage.step.kind == kConvStep ? stage.out->channels : 1;
    const int64_t col_parts = (columns + stage.cols - 1) / stage.cols, pieces = row_parts * col_parts;
    Counter& counter = counters_[(size_t)index];
    for (int64_t i; (i = counter.next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      const int64_t row = i / col_parts * stage.rows, col = i % col_parts * stage.cols;
      piece(stage, first, samples, row, smaller(lines, row + stage.rows), col, smaller(columns, col + stage.cols));
      counter.done.fetch_add(1, std::memory_order_release);
    }
    for (int64_t spins = 0; counter.done.load(std::memory_order_acquire) < pieces; ++spins) {
      if (spins > 4096) sched_yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }

  void piece(const Stage& stage, int64_t first, int64_t samples, int64_t row, int64_t row_end, int64_t col,
             int64_t col_end) {
    if (row >= row_end) return;
    const CodeStep& s = stage.step;
    const uint8_t* x = (const uint8_t*)sample(*stage.x, first);
    const uint8_t* other = stage.other ? (const uint8_t*)sample(*stage.other, first) : nullptr;
    uint8_t* out = (uint8_t*)const_cast<char*>(sample(*stage.out, first));
    const CodeValue& v = *stage.out;
    const int64_t line = v.width * v.channels;
    if (s.kind == kConvStep || s.kind == kDepthwiseStep) {
      ConvArgs args = stage.conv;
      args.x = x;
      args.batch = samples;
      args.finish.other = other;
      args.finish.out = out;
      if (s.kind == kConvStep) {
        const ThreadScratch scratch(codes_.conv_scratch_bytes(args, row_end - row));
        codes_.conv(args, row, row_end, col, col_end, scratch.get());
      } else {
        const ThreadScratch scratch(codes_.depthwise_scratch_bytes(args));
        codes_.depthwise(args, row, row_end, scratch.get());
      }
    } else if (s.kind == kQuantizeStep) {
      // A mean that an earlier step made lies as codes do.
      const CodeValue& from = *stage.x;
      QuantizeArgs args = {(const float*)x, from.channels, from.height, from.width, from.bytes() / 4, 1,
                           from.width * from.channels, from.channels, 0, 0, nullptr};
      if (s.first < (int64_t)images_.size()) {
        args = images_[(size_t)s.first];
        args.x = (const float*)from.base + first * args.stride_n;
      }
      args.inverse = s.real(0);
      args.zero = (int32_t)s.integer(1);
      args.out = out;
      if (codes_.quantize(args, row, row_end)) nan_.store(true);
    } else if (s.kind == kAddStep) {
      const AddArgs args = {x,         other,     s.real(0),        s.real(1), s.real(2),
                            s.real(3), s.real(4), (int32_t)s.integer(5), out};
      codes_.add(args, row * line, row_end * line);
    } else if (s.kind == kMultiplyStep) {
      // The value with one pixel comes second.
      const bool swapped = stage.x->height * stage.x->width != v.height * v.width;
      const CodeValue& second = swapped ? *stage.x : *stage.other;
      const MultiplyArgs args = {swapped ? other : x, swapped ? x : other, v.height * v.width, v.channels,
                                 second.height * second.width != v.height * v.width,
                                 (int32_t)s.integer(swapped ? 1 : 0), (int32_t)s.integer(swapped ? 0 : 1), s.real(2),
                                 s.real(3), s.real(4), (int32_t)s.integer(5), out};
      codes_.multiply(args, row * v.width, row_end * v.width);
    } else if (s.kind == kMaxPoolStep) {
      const PoolArgs args = {x, samples, stage.x->height, stage.x->width, v.channels, s.integer(0), s.integer(1),
                             s.integer(2), s.integer(3), s.integer(4), s.integer(5), s.integer(6), s.integer(7),
                             v.height, v.width, out};
      codes_.max_pool(args, row, row_end);
    } else if (s.kind == kTableStep) {
      const uint8_t* table = constants_.at<uint8_t>(s.integer(0), 256);
      for (int64_t i = row * line; i < row_end * line; ++i) out[i] = table[x[i]];
    } else {
      global_average(stage, x, (float*)out, row, row_end);
    }
  }

  void global_average(const Stage& stage, const uint8_t* x, float* out, int64_t row, int64_t row_end) const {
    const int64_t pixels = stage.x->height * stage.x->width, channels = stage.x->channels;
    const ThreadScratch scratch(channels * 4);
    int32_t* sums = static_cast<int32_t*>(scratch.get());
    const float zero = (float)stage.step.integer(0), scale = stage.step.real(1);
    for (int64_t r = row; r < row_end; ++r) {
      codes_.channel_sums(x + r * pixels * channels, pixels, channels, sums);
      for (int64_t c = 0; c < channels; ++c) out[r * channels + c] = ((float)sums[c] / (float)pixels - zero) * scale;
    }
  }

  // The memory of activations is kept for the next call: fresh pages cost more than many a step.
  void* aligned(int64_t bytes) {
    kept_ = std::make_unique<Kept>(bytes);
    return kept_->memory();
  }

  class Kept {
   public:
    explicit Kept(int64_t bytes) {
      block_ = slot().exchange(nullptr);
      if (block_ && (block_->bytes < bytes || block_->bytes > 4 * larger(bytes, 1 << 20))) drop();
      if (!block_) {
        const size_t size = (size_t)round_up(larger(bytes, 64), 64);
        char* memory = static_cast<char*>(std::aligned_alloc(64, size));
        if (!memory) throw std::bad_alloc();
        block_ = new Block{memory, (int64_t)size};
      }
    }
    ~Kept() {
      Block* none = nullptr;
      if (block_ && !slot().compare_exchange_strong(none, block_)) drop();
    }
    Kept(const Kept&) = delete;
    void* memory() const { return block_->memory; }

   private:
    struct Block {
      char* memory;
      int64_t bytes;
    };
    static std::atomic<Block*>& slot() {
      static std::atomic<Block*> kept{nullptr};
      return kept;
    }
    void drop() {
      std::free(block_->memory);
      delete block_;
      block_ = nullptr;
    }
    Block* block_;
  };

  const KernelTable& table_;
  const CodeKernels& codes_;
  const Constants& constants_;
  std::vector<CodeValue>& values_;
  const std::vector<QuantizeArgs>& images_;
  const int64_t batch_;
  int64_t group_ = 1, threads_ = 1;
  std::vector<Stage> stages_;
  std::unique_ptr<Kept> kept_;
  char* memory_ = nullptr;
  std::unique_ptr<Counter[]> counters_;
  std::atomic<bool> nan_{false};
};

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

std::vector<Tensor> take_tensors(StableIValue value) {
  const StableListHandle list = torch::stable::detail::to<StableListHandle>(value);
  size_t count = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &count));
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < count; ++i) {
    StableIValue item;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
    tensors.push_back(take_tensor(item));
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  return tensors;
}

StableIValue release_tensors(std::vector<Tensor>& tensors) {
  StableListHandle list;
  TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(tensors.size(), &list));
  for (Tensor& tensor : tensors) TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, tensor.release()));
  return torch::stable::detail::from(list);
}

CodeValue input_value(Tensor& x, QuantizeArgs* image) {
  check(x.dim() == 4, "run_codes takes images [batch, channels, height, width]");
  CodeValue v;
  v.channels = x.size(1);
  v.height = x.size(2);
  v.width = x.size(3);
  v.is_float = x.dtype() == aoti_torch_dtype_float32();
  check(v.is_float || x.dtype() == aoti_torch_dtype_uint8(), "run_codes takes float32 images and uint8 codes");
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
