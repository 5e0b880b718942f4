// Sums of a depthwise convolution for compilers to vectorise: widened products, added one kernel position at a time.

namespace {

constexpr int64_t kTapGroup = 1;

// `weight`: rows of 64 channels, `stride` apart.
inline void prepare_taps(const int8_t* weight, int64_t taps, int64_t stride, int8_t* prepared) {
  for (int64_t t = 0; t < taps; ++t) memcpy(prepared + t * 64, weight + t * stride, 64);
}

inline void add_taps(const uint8_t* const* from, int64_t taps, int64_t first, int64_t count, const int8_t* weight,
                     int32_t* sums) {
  for (int64_t c = 0; c < 64; ++c) sums[c] = 0;
  for (int64_t t = 0; t < taps; ++t) {
    const uint8_t* x = from[t] + first;
    const int8_t* w = weight + t * 64;
    if (count == 64) {
      for (int64_t c = 0; c < 64; ++c) sums[c] += (int32_t)(int16_t)((int16_t)x[c] * (int16_t)w[c]);
    } else {
      for (int64_t c = 0; c < count; ++c) sums[c] += (int32_t)(int16_t)((int16_t)x[c] * (int16_t)w[c]);
    }
  }
}

}  // namespace
