// Steps on 8-bit codes as the operator run_codes gets them: parsed from text, checked, and laid out in memory.
//
// The text is integers between spaces: how many inputs, outputs and steps there are, the numbers of the outputs, and for
// each step its kind, the number of its value, the numbers of what it reads (-1 for nothing), how many parameters follow,
// and these. Floats stand as the bits of a float32. mono_quant/ops/codes.py writes it and says what the parameters are.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "codes.h"
#include "kernels.h"
#include "tensor.h"

namespace mono_quant {

enum StepKind : int64_t {
  kQuantizeStep = 0,
  kConvStep = 1,
  kDepthwiseStep = 2,
  kAddStep = 3,
  kMultiplyStep = 4,
  kMaxPoolStep = 5,
  kGlobalAverageStep = 6,
  kTableStep = 7,
};

// How many parameters each kind has.
constexpr int64_t kParameters[] = {2, 25, 25, 6, 6, 9, 3, 1};

struct CodeStep {
  int64_t kind, output, first, second;
  const int64_t* parameters;
  int64_t integer(int i) const { return parameters[i]; }
  float real(int i) const {
    const int32_t bits = (int32_t)parameters[i];
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

struct CodeProgram {
  int64_t inputs = 0;
  std::vector<int64_t> numbers;  // what the steps' parameters point into
  std::vector<int64_t> outputs;
  std::vector<CodeStep> steps;

  explicit CodeProgram(const std::string& text) {
    parse_numbers(text);
    size_t at = 0;
    const auto next = [&]() {
      check(at < numbers.size(), "the program of run_codes ends too early");
      return numbers[at++];
    };
    inputs = next();
    const int64_t output_count = next(), step_count = next();
    check(inputs > 0 && output_count > 0 && step_count > 0, "the program of run_codes holds nothing");
    for (int64_t i = 0; i < output_count; ++i) outputs.push_back(next());
    int64_t known = inputs;
    for (int64_t i = 0; i < step_count; ++i) {
      CodeStep step;
      step.kind = next();
      step.output = next();
      step.first = next();
      step.second = next();
      const int64_t count = next();
      const bool valid = step.kind >= 0 && step.kind <= kTableStep && count == kParameters[step.kind] &&
                         step.output == known && step.first >= 0 && step.first < known && step.second >= -1 &&
                         step.second < known && at + (size_t)count <= numbers.size();
      check(valid, "the program of run_codes holds a step that cannot be");
      step.parameters = numbers.data() + at;
      at += (size_t)count;
      ++known;
      steps.push_back(step);
    }
    // Each output is memory of its own, and a step writes to one place.
    std::vector<bool> named((size_t)known, false);
    for (const int64_t output : outputs) {
      check(output >= inputs && output < known, "an output is no step's value");
      check(!named[(size_t)output], "the program of run_codes names an output twice");
      named[(size_t)output] = true;
    }
  }

 private:
  void parse_numbers(const std::string& text) {
    numbers.reserve(text.size() / 3);
    for (const char* p = text.c_str(); *p;) {
      if (*p == ' ') {
        ++p;
        continue;
      }
      const bool negative = *p == '-';
      if (negative) ++p;
      check(*p >= '0' && *p <= '9', "the program of run_codes is not made of integers");
      int64_t value = 0;
      for (; *p >= '0' && *p <= '9'; ++p) {
        check(value < (int64_t(1) << 52), "a number in the program of run_codes is too large");
        value = value * 10 + (*p - '0');
      }
      numbers.push_back(negative ? -value : value);
    }
  }
};

// What one sample of a value is, and where it lies.
struct CodeValue {
  int64_t channels = 0, height = 0, width = 0;
  bool is_float = false;
  bool flat = false;  // [B, C], not an image
  char* base = nullptr;  // of the first sample of an input or an output; else null
  int64_t offset = 0;  // in the memory that samples share, for each sample in it
  int64_t born = 0, last = 0;  // steps
  int64_t bytes() const { return channels * height * width * (is_float ? 4 : 1); }
};

// What one sample of a value may take, and all values of a sample together: far beyond any memory, and small enough for
// products of such numbers with few others to fit 64 bits.
constexpr int64_t kMostBytes = int64_t(1) << 40;

// Throws where a value is larger than that, before its size is computed with. Empty values have sides as well.
inline void check_size(const CodeValue& v) {
  int64_t bytes = 4;
  for (const int64_t side : {v.channels, v.height, v.width}) {
    check(side >= 0 && side <= kMostBytes, "a value of run_codes has no shape");
    check(side == 0 || bytes <= kMostBytes / side, "a value of run_codes is too large");
    bytes *= larger(side, 1);
  }
}

// How many windows there are along one side. Throws where there is none: PyTorch refuses such images too.
inline int64_t window_count(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t pad_end, int64_t dilation,
                            bool ceil) {
  check(kernel > 0 && stride > 0 && dilation > 0 && pad >= 0 && pad_end >= 0, "a window has no size");
  const bool sane = kernel <= 4096 && larger(stride, dilation) <= 65536 && larger(pad, pad_end) <= 65536;
  check(sane, "a window is too large");
  check(size > 0, "an image has no pixels for a window");
  // Where sizes are rounded up, a last window may reach beyond the padding.
  const int64_t span = size + pad + pad_end - dilation * (kernel - 1) - 1 + (ceil ? stride - 1 : 0);
  check(span >= 0, "a window is larger than the image");
  int64_t count = span / stride + 1;
  if (ceil && (count - 1) * stride >= size + pad) --count;  // a window starts inside the image or its left padding
  return count;
}

// The shape of a step's value. Throws where the step does not fit what it reads.
inline CodeValue step_value(const CodeStep& s, const std::vector<CodeValue>& values) {
  const CodeValue& x = values[(size_t)s.first];
  const CodeValue* other = s.second < 0 ? nullptr : &values[(size_t)s.second];
  check(x.is_float == (s.kind == kQuantizeStep), "a step of run_codes reads a value of the wrong type");
  check(!other || !other->is_float, "a step of run_codes reads a value of the wrong type");
  check(!x.flat && (!other || !other->flat), "a step of run_codes reads what is no image");
  CodeValue out = x;
  out.base = nullptr;
  out.is_float = false;
  if (s.kind == kConvStep || s.kind == kDepthwiseStep) {
    out.channels = s.integer(0);
    out.height = window_count(x.height, s.integer(1), s.integer(3), s.integer(5), s.integer(23), s.integer(7), false);
    out.width = window_count(x.width, s.integer(2), s.integer(4), s.integer(6), s.integer(24), s.integer(8), false);
    out.is_float = s.integer(14) == kFloat;
    const bool channels = out.channels > 0 && s.integer(22) == x.channels && x.channels > 0 &&
                          (s.kind == kConvStep || out.channels == x.channels);
    check(channels, "a convolution's channels do not fit");
    check(s.kind == kConvStep || s.integer(1) * s.integer(2) <= kLargestKernel, "a depthwise kernel is too large");
    const bool fits = !other || (other->channels == out.channels && other->height == out.height &&
                                 other->width == out.width);
    check(fits, "what a convolution adds has another shape");
  } else if (s.kind == kAddStep || s.kind == kMultiplyStep) {
    check(other != nullptr, "a step of run_codes lacks an input");
    const bool same = other->channels == x.channels && other->height == x.height && other->width == x.width;
    const bool pixel = x.height * x.width == 1 || other->height * other->width == 1;
    const bool gate = s.kind == kMultiplyStep && other->channels == x.channels && pixel;
    check(same || gate, "the inputs of a sum or product do not fit");
    if (x.height * x.width == 1) {
      out.height = other->height;
      out.width = other->width;
    }
  } else if (s.kind == kMaxPoolStep) {
    const int64_t pad_h = s.integer(4), pad_w = s.integer(5);
    const bool ceil = s.integer(8) != 0;
    out.height = window_count(x.height, s.integer(0), s.integer(2), pad_h, pad_h, s.integer(6), ceil);
    out.width = window_count(x.width, s.integer(1), s.integer(3), pad_w, pad_w, s.integer(7), ceil);
  } else if (s.kind == kGlobalAverageStep) {
    out.height = out.width = 1;
    out.is_float = true;
    out.flat = s.integer(2) == 0;
  }
  check_size(out);
  return out;
}

// Places for the values that only steps see: each gets the first gap that is free while it lives. Answers the bytes that
// one sample takes.
inline int64_t place_values(std::vector<CodeValue>& values) {
  int64_t total = 0;
  std::vector<const CodeValue*> placed;
  for (CodeValue& value : values) {
    if (value.base) continue;
    const int64_t size = round_up(value.bytes() + 64, 64);
    int64_t at = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (const CodeValue* p : placed) {
        const bool meets = p->last >= value.born && value.last >= p->born;
        const int64_t end = p->offset + round_up(p->bytes() + 64, 64);
        if (meets && p->offset < at + size && at < end) {
          at = end;
          moved = true;
        }
      }
    }
    value.offset = at;
    placed.push_back(&value);
    total = larger(total, at + size);
    check(total <= kMostBytes, "the values of run_codes are too large");
  }
  return total;
}

}  // namespace mono_quant
