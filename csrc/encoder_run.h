// One layer of a transformer encoder: attention over a sequence and a feed-forward pair, each added to its input and
// normalized, with int8 linear layers in between.
//
// Each thread takes whole sequences through all steps, so that what a step answers is read from the cache by the next
// one. The sequences that are left (all of them, where there are fewer than threads) are shared: threads take pieces of a
// step from a counter and wait for each other between steps by spinning. A thread that comes late finds nothing left to
// do; no number of threads is relied on.
#pragma once

#include <sched.h>

#include <atomic>
#include <memory>
#include <vector>

#include "isa.h"
#include "kept_memory.h"
#include "parallel.h"

namespace mono_quant {

struct EncoderLinear {
  const int8_t* packed;
  const int32_t* column_sum;
  const float* weight_scale;
  const int8_t* weight_zero_point;  // or null
  const float* bias;
  int64_t inputs, outputs;
  Activation activation;
};

struct EncoderNorm {
  const float* weight;
  const float* bias;
  float eps;
};

struct EncoderArgs {
  const float* x;  // [samples, length, width]
  float* out;
  int64_t samples, length, width, heads;
  EncoderLinear query, key, value, output, up, down;
  EncoderNorm attention_norm, output_norm;
  float scale;
  const float* mask;  // [samples, mask_rows, round_up(length, kMaskColumns)] or null
  int64_t mask_rows;  // 1 or length
};

class EncoderRun {
 public:
  explicit EncoderRun(const EncoderArgs& args) : p_(args), table_(kernels()) {
    const double rows = (double)(p_.samples * p_.length);
    const double products = rows * (double)p_.width * (double)(4 * p_.width + 2 * p_.up.outputs);
    // Multiply-adds of attention are float32 ones, about an eighth as fast.
    const double attention = 2. * rows * (double)p_.length * (double)p_.width;
    threads_ = worthwhile_threads((products + 8 * attention) / table_.speed);
    const int64_t share = p_.samples / threads_;
    group_ = larger(1, smaller(share, kGroupRows / larger(1, p_.length)));
    alone_ = share == 0 ? 0 : p_.samples / group_ / threads_ * threads_;
    if (threads_ == 1) alone_ = (p_.samples + group_ - 1) / group_;
    shared_ = larger(0, p_.samples - alone_ * group_);
    chunk_ = smaller(kGroupRows, larger(1, group_ * p_.length));
    const int64_t own = carve(nullptr, group_ * p_.length, chunk_).bytes;
    const int64_t common = carve(nullptr, shared_ * p_.length, shared_ * p_.length).bytes;
    area_ = own;
    kept_ = std::make_unique<KeptMemory>(own * smaller(alone_, threads_) + common);
    attention_scratch_ = table_.attention_scratch_bytes(head(p_.x, p_.x, p_.x, nullptr, 0, 0));
  }

  void run() {
    std::atomic<int64_t> next_group{0}, next_area{0};
    run_tasks(threads_, [&](int64_t) {
      Group g = {};
      for (int64_t i; (i = next_group.fetch_add(1)) < alone_;) {
        if (!g.memory) g.memory = kept_->memory() + next_area.fetch_add(1) * area_;
        g.first = i * group_;
        g.samples = smaller(group_, p_.samples - g.first);
        run_alone(g);
      }
      if (shared_ == 0) return;
      g = {alone_ * group_, shared_, kept_->memory() + smaller(alone_, threads_) * area_};
      run_shared(g);
    });
  }

 private:
  // Rows that go through the feed-forward part together: enough for each weight that is fetched.
  static constexpr int64_t kGroupRows = 128;
  static constexpr int kSteps = 10;

  struct Group {
    int64_t first, samples;
    char* memory;
  };

  struct Buffers {
    float *query, *key, *value, *context, *sum, *hidden;  // [rows, width]
    float* wide;  // [chunk, outputs of `up`]
    uint8_t* codes;
    float* scale;
    int32_t* zero_point;
    int64_t bytes;
  };

  // A step for the rows [begin, begin + rows) of a group; pieces are ranges of rows (or heads) and of columns.
  struct Piece {
    int64_t begin, end, col_begin, col_end;
  };

  Buffers carve(char* base, int64_t rows, int64_t chunk) const {
    int64_t at = 0;
    auto take = [&](int64_t bytes) {
      char* piece = base ? base + at : nullptr;
      at += round_up(bytes, 64);
      return piece;
    };
    const int64_t width = p_.width * 4, wide = p_.up.outputs * 4;
    Buffers b;
    b.query = (float*)take(rows * width);
    b.key = (float*)take(rows * width);
    b.value = (float*)take(rows * width);
    // What attention answers replaces the queries; after it keys and values are not needed.
    b.context = b.query;
    b.sum = b.key;
    b.hidden = b.value;
    b.wide = (float*)take(chunk * wide);
    const int64_t narrow_codes = rows * round_up(p_.width, kPanelDepth);
    const int64_t wide_codes = chunk * round_up(p_.up.outputs, kPanelDepth);
    const int64_t behind = kReadablePastEnd * round_up(larger(p_.width, p_.up.outputs), kPanelDepth);
    b.codes = (uint8_t*)take(larger(narrow_codes, wide_codes) + behind);
    b.scale = (float*)take(rows * 4);
    b.zero_point = (int32_t*)take(rows * 4);
    b.bytes = at;
    return b;
  }

  AttentionArgs head(const float* query, const float* key, const float* value, float* context, int64_t sample,
                     int64_t number) const {
    const int64_t depth = p_.width / p_.heads, at = number * depth;
    AttentionArgs a = {};
    a.q = query + at;
    a.k = key + at;
    a.v = value + at;
    a.q_stride = a.k_stride = a.v_stride = a.out_stride = p_.width;
    a.queries = a.keys = p_.length;
    a.depth = depth;
    a.scale = p_.scale;
    if (p_.mask) {
      const int64_t row = round_up(p_.length, kMaskColumns);
      a.mask = p_.mask + sample * p_.mask_rows * row;
      a.mask_stride = p_.mask_rows == 1 ? 0 : row;
    }
    a.out = context ? context + at : nullptr;
    return a;
  }

  void attend(const Group& g, const Buffers& b, const Piece& piece) const {
    const ThreadScratch scratch(attention_scratch_);
    for (int64_t i = piece.begin; i < piece.end; ++i) {
      const int64_t sample = i / p_.heads, at = sample * p_.length * p_.width;
      table_.attention(
          head(b.query + at, b.key + at, b.value + at, b.context + at, g.first + sample, i % p_.heads),
          scratch.get());
    }
  }

  void quantize(const float* x, int64_t width, const Buffers& b, const Piece& piece) const {
    const int64_t stride = round_up(width, kPanelDepth);
    table_.quantize_rows(x + piece.begin * width, kFloat32, width, piece.end - piece.begin, width,
                         b.codes + piece.begin * stride, stride, b.scale + piece.begin, b.zero_point + piece.begin);
  }

  void multiply(const EncoderLinear& layer, const Buffers& b, int64_t rows, float* out, const Piece& piece) const {
    LinearArgs a = {};
    a.x_stride = a.k = layer.inputs;
    a.dtype = kFloat32;
    a.m = rows;
    a.n = layer.outputs;
    a.packed = layer.packed;
    a.column_sum = layer.column_sum;
    a.weight_scale = layer.weight_scale;
    a.weight_zero_point = layer.weight_zero_point;
    a.bias = layer.bias;
    a.activation = layer.activation;
    a.out = out;
    a.codes = b.codes;
    a.x_scale = b.scale;
    a.x_zero_point = b.zero_point;
    const ThreadScratch scratch(table_.linear_scratch_bytes(a, piece.end - piece.begin));
    table_.linear(a, piece.begin, piece.end, piece.col_begin, piece.col_end, scratch.get());
  }

  void normalize(const EncoderNorm& norm, const float* x, const float* residual, float* out, const Piece& piece) const {
    table_.add_norm({x, residual, p_.width, norm.weight, norm.bias, norm.eps, out}, piece.begin, piece.end);
  }

  // Steps 0 to 2 are for all rows of a group, 3 to 9 for a chunk of `rows` rows that starts at `from`.
  void step(int number, const Group& g, const Buffers& b, int64_t from, int64_t rows, const Piece& piece) const {
    const int64_t start = g.first * p_.length + from;
    switch (number) {
      case 0: return quantize(p_.x + g.first * p_.length * p_.width, p_.width, b, piece);
      case 1: return project(b, g.samples * p_.length, piece);
      case 2: return attend(g, b, piece);
      case 3: return quantize(b.context + from * p_.width, p_.width, b, piece);
      case 4: return multiply(p_.output, b, rows, b.sum, piece);
      case 5:
        normalize(p_.attention_norm, b.sum, p_.x + start * p_.width, b.hidden, piece);
        return quantize(b.hidden, p_.width, b, piece);
      case 6: return multiply(p_.up, b, rows, b.wide, piece);
      case 7: return quantize(b.wide, p_.up.outputs, b, piece);
      case 8: return multiply(p_.down, b, rows, b.sum, piece);
      default: return normalize(p_.output_norm, b.sum, b.hidden, p_.out + start * p_.width, piece);
    }
  }

  // Columns of query, key and value side by side, each padded to a multiple of 64.
  void project(const Buffers& b, int64_t rows, const Piece& piece) const {
    const EncoderLinear* const layers[] = {&p_.query, &p_.key, &p_.value};
    float* const to[] = {b.query, b.key, b.value};
    const int64_t padded = round_up(p_.width, 64);
    for (int i = 0; i < 3; ++i) {
      const int64_t begin = larger(piece.col_begin - i * padded, 0), end = smaller(piece.col_end - i * padded, p_.width);
      if (begin < end) multiply(*layers[i], b, rows, to[i], {piece.begin, piece.end, begin, end});
    }
  }

  // What the pieces of a step are ranges of.
  int64_t lines_of(int number, const Group& g, int64_t rows) const {
    if (number == 2) return g.samples * p_.heads;
    return number < 2 ? g.samples * p_.length : rows;
  }
  int64_t columns_of(int number) const {
    if (number == 1) return 3 * round_up(p_.width, 64);
    if (number == 4 || number == 8) return p_.width;
    return number == 6 ? p_.up.outputs : 1;
  }

  void run_alone(const Group& g) const {
    const int64_t rows = g.samples * p_.length;
    const Buffers b = carve(g.memory, group_ * p_.length, chunk_);
    for (int i = 0; i < 3; ++i) step(i, g, b, 0, rows, {0, lines_of(i, g, rows), 0, columns_of(i)});
    for (int64_t from = 0; from < rows; from += chunk_) {
      const int64_t count = smaller(chunk_, rows - from);
      for (int i = 3; i < kSteps; ++i) step(i, g, b, from, count, {0, count, 0, columns_of(i)});
    }
  }

  void run_shared(const Group& g) {
    const int64_t rows = g.samples * p_.length;
    const Buffers b = carve(g.memory, rows, rows);
    for (int i = 0; i < kSteps; ++i) {
      const int64_t lines = lines_of(i, g, rows), columns = columns_of(i), parts = 2 * threads_;
      // Products are divided by columns where rows are few: each piece then reads its own weights only.
      const int64_t row_parts = columns > 1 ? smaller(threads_, larger(1, lines / 64)) : smaller(lines, parts);
      const int64_t row_step = (lines + row_parts - 1) / row_parts;
      const int64_t col_parts = columns > 1 ? larger(1, parts / row_parts) : 1;
      const int64_t col_step = columns > 1 ? round_up((columns + col_parts - 1) / col_parts, 64) : 1;
      const int64_t across = (columns + col_step - 1) / col_step, pieces = (lines + row_step - 1) / row_step * across;
      Counter& counter = counters_[i];
      for (int64_t n; (n = counter.next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
        const int64_t row = n / across * row_step, col = n % across * col_step;
        step(i, g, b, 0, rows, {row, smaller(lines, row + row_step), col, smaller(columns, col + col_step)});
        counter.done.fetch_add(1, std::memory_order_release);
      }
      wait_for(counter, pieces);
    }
  }

  struct alignas(128) Counter {
    std::atomic<int64_t> next{0}, done{0};
  };

  static void wait_for(const Counter& counter, int64_t pieces) {
    for (int64_t spins = 0; counter.done.load(std::memory_order_acquire) < pieces; ++spins) {
      if (spins > 4096) sched_yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }

  const EncoderArgs p_;
  const KernelTable& table_;
  int64_t threads_ = 1;
  int64_t group_ = 1;  // samples that a thread takes at once
  int64_t alone_ = 0;  // such groups
  int64_t shared_ = 0;  // samples that are left
  int64_t chunk_ = 1;
  int64_t area_ = 0;
  int64_t attention_scratch_ = 0;
  std::unique_ptr<KeptMemory> kept_;
  Counter counters_[kSteps];
};

}  // namespace mono_quant
