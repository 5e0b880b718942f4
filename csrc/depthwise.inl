// Depthwise convolutions from codes to codes: one row of channels at a time. The unit supplies, before:
//   kTapGroup                  how many kernel positions it adds at once; the weights' rows are padded with zeros to that
//   prepare_taps(...)          the weights of 64 channels in the order that add_taps wants
//   add_taps(...)              the sums of 64 channels over all kernel positions
//
// Bound: for each 64 outputs the kernel's positions are loaded once and interleaved; finishing the sums takes as long as
// making them where the kernel is 3x3.

namespace {

constexpr int64_t kChannelBlock = 64;
// Output pixels side by side whose sums are finished together.
constexpr int64_t kPixelRun = 8;

inline int64_t padded_taps(const ConvArgs& p) { return mono_quant::round_up(p.kernel_h * p.kernel_w, kTapGroup); }

// Zero codes: what a run of pixels reads where a row of the kernel is outside of the image.
inline int64_t zero_codes(const ConvArgs& p) {
  return mono_quant::round_up(p.channels, kChannelBlock) + (kPixelRun - 1) * p.stride_w * p.channels;
}

// Scratch: the prepared weights, zero codes.
int64_t depthwise_scratch_bytes(const ConvArgs& p) {
  return padded_taps(p) * mono_quant::round_up(p.channels, kChannelBlock) + zero_codes(p);
}

// Where each kernel position of the output pixel at `ox` is read.
inline void point_taps(const ConvArgs& p, const uint8_t* image, int64_t oy, int64_t ox, const uint8_t* zeros,
                       const uint8_t** from) {
  const int64_t top = oy * p.stride_h - p.pad_h, left = ox * p.stride_w - p.pad_w;
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t y = top + i * p.dilation_h;
    for (int64_t j = 0; j < p.kernel_w; ++j) {
      const int64_t x = left + j * p.dilation_w;
      const bool outside = y < 0 || y >= p.height || x < 0 || x >= p.width;
      from[i * p.kernel_w + j] = outside ? zeros : image + (y * p.width + x) * p.channels;
    }
  }
  // Their weights are zero.
  const int64_t taps = p.kernel_h * p.kernel_w;
  for (int64_t i = taps; i < padded_taps(p); ++i) from[i] = from[0];
}

void depthwise_row(const ConvArgs& p, int64_t sample, int64_t oy, const int8_t* weight, const uint8_t* zeros,
                   FinishRows finish) {
  const int64_t padded = padded_taps(p), reach = (p.kernel_w - 1) * p.dilation_w, step = p.stride_w * p.channels;
  const uint8_t* image = p.x + sample * p.height * p.width * p.channels;
  const uint8_t* from[mono_quant::kLargestKernel + 4];
  alignas(64) int32_t sums[kPixelRun * kChannelBlock];
  for (int64_t ox = 0, run; ox < p.out_width; ox += run) {
    point_taps(p, image, oy, ox, zeros, from);
    run = 1;
    if (ox * p.stride_w >= p.pad_w) {
      // Pixels up to the last one whose kernel is within the image's width.
      const int64_t room = p.width - 1 - reach + p.pad_w, last = room < 0 ? -1 : room / p.stride_w;
      run = mono_quant::larger(1, mono_quant::smaller(kPixelRun, mono_quant::smaller(last + 1, p.out_width) - ox));
    }
    const int64_t pixel = (sample * p.out_height + oy) * p.out_width + ox;
    for (int64_t c = 0; c < p.channels; c += kChannelBlock) {
      const int64_t count = mono_quant::smaller(kChannelBlock, p.channels - c);
      for (int64_t i = 0; i < run; ++i) {
        add_taps(from, padded, c + i * step, count, weight + c * padded, sums + i * kChannelBlock);
      }
      finish(p.finish, sums, kChannelBlock, pixel, run, c, count);
    }
  }
}

void depthwise(const ConvArgs& p, int64_t row_begin, int64_t row_end, void* scratch) {
  const int64_t channels = mono_quant::round_up(p.channels, kChannelBlock), taps = p.kernel_h * p.kernel_w;
  int8_t* weight = (int8_t*)scratch;
  uint8_t* zeros = (uint8_t*)scratch + padded_taps(p) * channels;
  memset(zeros, p.x_zero, (size_t)zero_codes(p));
  for (int64_t c = 0; c < channels; c += kChannelBlock) {
    prepare_taps(p.weight + c, taps, channels, weight + c * padded_taps(p));
  }
  const FinishRows finish = finish_rows_for(p.finish);
  for (int64_t row = row_begin; row < row_end; ++row) {
    depthwise_row(p, row / p.out_height, row % p.out_height, weight, zeros, finish);
  }
}

}  // namespace
