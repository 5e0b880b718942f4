// Runs the steps of a CodeProgram on a batch.
//
// Each thread takes groups of samples through all steps by itself, so that what a step answers is still in the cache when
// the next one reads it, and memory for activations does not grow with the batch. The samples that are left (all of them
// in a batch smaller than the number of threads) are shared: threads take pieces of a step from a counter and meet between
// steps. A thread that comes late, or a task that runs after the others, finds nothing left to do: no number of threads is
// relied on.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "code_program.h"
#include "isa.h"
#include "kept_memory.h"
#include "meetings.h"
#include "parallel.h"

namespace mono_quant {

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
  const uint8_t* table;
  // Pieces of `rows` by `cols` for a full group; of what they are rows depends on the kind.
  int64_t rows = 1, cols = 1;
};

inline ConvArgs conv_args(const CodeStep& s, const CodeValue& x, const CodeValue& out, const Constants& constants) {
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
  check(x.channels <= 65536 / taps, "a convolution's sums may not fit 32 bits");
  const int64_t weights = s.kind == kDepthwiseStep
                              ? taps * padded
                              : (out.channels + 15) / 16 * 16 * round_up(taps * x.channels, kPanelDepth);
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
    check(batch <= (int64_t(1) << 62) / larger(per_sample, 1), "the batch of run_codes is too large");
    double products = 0;
    for (const CodeStep& step : program.steps) products += add_stage(step);
    threads_ = worthwhile_threads((double)batch * products / table_.speed);
    // Samples that a thread runs alone, in groups of equal size; the rest is shared by all threads.
    if (threads_ > 1) {
      const int64_t share = batch / threads_;
      const int64_t parts = larger(1, (share * per_sample + kGroupBytes - 1) / kGroupBytes);
      group_ = smaller(larger(1, share), (share + parts - 1) / parts);
      alone_ = share == 0 ? 0 : batch / group_ / threads_ * threads_;
    } else {
      group_ = smaller(batch, larger(1, kGroupBytes / larger(per_sample, 1)));
      alone_ = (batch + group_ - 1) / group_;
    }
    shared_ = larger(0, batch - alone_ * group_);
    for (Stage& stage : stages_) divide(stage);
    area_ = round_up(per_sample * larger(group_, shared_), 64);
    kept_ = std::make_unique<KeptMemory>(area_ * (smaller(alone_, threads_) + (shared_ > 0)));
  }

  // Answers whether a value to be quantized was NaN.
  bool run() {
    meeting_ = std::make_unique<Meetings>((int64_t)stages_.size());
    std::atomic<int64_t> next_group{0}, next_area{0};
    run_tasks(threads_, [&](int64_t) {
      Group group = {0, group_, nullptr};
      for (int64_t i; (i = next_group.fetch_add(1)) < alone_;) {
        if (!group.memory) group.memory = area(next_area.fetch_add(1));
        group.first = i * group_;
        group.samples = smaller(group_, batch_ - group.first);
        for (const Stage& stage : stages_) run_alone(stage, group);
      }
      group = {alone_ * group_, shared_, area(smaller(alone_, threads_))};
      for (size_t i = 0; shared_ > 0 && i < stages_.size(); ++i) run_shared((int64_t)i, group);
    });
    return nan_.load();
  }

 private:
  // What the activations of the samples that go through the steps together may take.
  static constexpr int64_t kGroupBytes = 8 << 20;

  struct Group {
    int64_t first, samples;
    char* memory;
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
    } else if (step.kind == kTableStep) {
      stage.table = constants_.at<uint8_t>(step.integer(0), 256);
    }
    stages_.push_back(stage);
    return products;
  }

  // Pieces small enough to share evenly, large enough that each is worth its counting.
  void divide(Stage& stage) const {
    const CodeValue& out = *stage.out;
    const int64_t pieces = threads_ == 1 ? 1 : 4 * threads_;
    if (stage.step.kind == kConvStep) {
      const int64_t pixels = shared_ * out.height * out.width, columns = (out.channels + 63) / 64;
      const int64_t row_parts = smaller(pieces, larger(1, pixels / 48));
      const int64_t col_parts = smaller(columns, (pieces + row_parts - 1) / row_parts);
      stage.rows = larger(12, round_up((pixels + row_parts - 1) / row_parts, 12));
      stage.cols = (columns + col_parts - 1) / col_parts * 64;
    } else if (stage.step.kind == kGlobalAverageStep) {
      stage.rows = 1;
    } else {
      const int64_t lines = shared_ * out.height;
      stage.rows = larger(1, (lines + pieces - 1) / pieces);
    }
  }

  char* area(int64_t index) const { return kept_->memory() + index * area_; }

  const char* sample(const CodeValue& v, const Group& group) const {
    return v.base ? v.base + group.first * v.bytes() : group.memory + v.offset * group.samples;
  }

  static int64_t lines_of(const Stage& stage, const Group& group) {
    if (stage.step.kind == kGlobalAverageStep) return group.samples;
    return group.samples * stage.out->height * (stage.step.kind == kConvStep ? stage.out->width : 1);
  }

  static int64_t columns_of(const Stage& stage) { return stage.step.kind == kConvStep ? stage.out->channels : 1; }

  void run_alone(const Stage& stage, const Group& group) {
    piece(stage, group, 0, lines_of(stage, group), 0, columns_of(stage));
  }

  void run_shared(int64_t number, const Group& group) {
    const Stage& stage = stages_[(size_t)number];
    const int64_t lines = lines_of(stage, group), columns = columns_of(stage);
    const int64_t row_parts = (lines + stage.rows - 1) / stage.rows;
    const int64_t col_parts = (columns + stage.cols - 1) / stage.cols;
    meeting_->share(number, row_parts * col_parts, [&](int64_t i) {
      const int64_t row = i / col_parts * stage.rows, col = i % col_parts * stage.cols;
      piece(stage, group, row, smaller(lines, row + stage.rows), col, smaller(columns, col + stage.cols));
    });
  }

  void piece(const Stage& stage, const Group& group, int64_t row, int64_t row_end, int64_t col, int64_t col_end) {
    if (row >= row_end) return;
    const CodeStep& s = stage.step;
    const uint8_t* x = (const uint8_t*)sample(*stage.x, group);
    const uint8_t* other = stage.other ? (const uint8_t*)sample(*stage.other, group) : nullptr;
    uint8_t* out = (uint8_t*)const_cast<char*>(sample(*stage.out, group));
    const CodeValue& v = *stage.out;
    const int64_t line = v.width * v.channels;
    if (s.kind == kConvStep || s.kind == kDepthwiseStep) {
      ConvArgs args = stage.conv;
      args.x = x;
      args.batch = group.samples;
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
        args.x = (const float*)from.base + group.first * args.stride_n;
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
      const PoolArgs args = {x, group.samples, stage.x->height, stage.x->width, v.channels, s.integer(0), s.integer(1),
                             s.integer(2), s.integer(3), s.integer(4), s.integer(5), s.integer(6), s.integer(7),
                             v.height, v.width, out};
      codes_.max_pool(args, row, row_end);
    } else if (s.kind == kTableStep) {
      for (int64_t i = row * line; i < row_end * line; ++i) out[i] = stage.table[x[i]];
    } else {
      global_average(stage, x, (float*)out, row, row_end);
    }
  }

  void global_average(const Stage& stage, const uint8_t* x, float* out, int64_t row, int64_t row_end) const {
    const int64_t pixels = stage.x->height * stage.x->width, channels = stage.x->channels;
    const ThreadScratch scratch(channels * (8 + 4));
    int64_t* totals = static_cast<int64_t*>(scratch.get());
    int32_t* sums = reinterpret_cast<int32_t*>(totals + channels);
    const float zero = (float)stage.step.integer(0), scale = stage.step.real(1);
    for (int64_t r = row; r < row_end; ++r) {
      for (int64_t c = 0; c < channels; ++c) totals[c] = 0;
      for (int64_t i = 0; i < pixels; i += kMostSummed) {
        codes_.channel_sums(x + (r * pixels + i) * channels, smaller(kMostSummed, pixels - i), channels, sums);
        for (int64_t c = 0; c < channels; ++c) totals[c] += sums[c];
      }
      for (int64_t c = 0; c < channels; ++c) {
        out[r * channels + c] = ((float)totals[c] / (float)pixels - zero) * scale;
      }
    }
  }

  const KernelTable& table_;
  const CodeKernels& codes_;
  const Constants& constants_;
  std::vector<CodeValue>& values_;
  const std::vector<QuantizeArgs>& images_;
  const int64_t batch_;
  int64_t threads_ = 1;
  int64_t group_ = 1;  // samples in a group that one thread runs
  int64_t alone_ = 0;  // such groups
  int64_t shared_ = 0;  // samples that are left
  int64_t area_ = 0;  // bytes for the activations of a group
  std::vector<Stage> stages_;
  std::unique_ptr<KeptMemory> kept_;
  std::unique_ptr<Meetings> meeting_;
  std::atomic<bool> nan_{false};
};

}  // namespace mono_quant
