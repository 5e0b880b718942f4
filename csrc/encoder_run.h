// Layers of a transformer encoder, one after the other: attention over a sequence and a feed-forward pair, each added to
// its input and normalized, with int8 linear layers in between.
//
// Each thread takes whole sequences through all steps of a layer, so that what a step answers is read from the cache by
// the next one. The sequences that are left (all of them, where there are fewer than threads) are shared: threads take
// pieces of a step from a counter and wait for each other between steps by spinning. They meet between layers too, so
// that each layer's weights are read while they are in the caches, by all sequences. A thread that comes late finds
// nothing left to do; no number of threads is relied on. All is computed in float32; with bfloat16 what leaves a layer is
// rounded.
#pragma once

#include <array>
#include <vector>

#include "packed_layer.h"

namespace mono_quant {

struct EncoderNorm {
  const float* weight;
  const float* bias;
  float eps;
};

struct EncoderLayer {
  PackedLayer query, key, value, output, up, down;
  EncoderNorm attention_norm, output_norm;

  // In the order of the operators' weights.
  std::array<PackedLayer*, 6> linears() { return {&query, &key, &value, &output, &up, &down}; }
};

// What the layers have in common.
struct EncoderArgs {
  DType dtype;  // of x and out: float32 or bfloat16
  const void* x;  // [samples, length, width]
  void* out;
  int64_t samples, length, width, heads;
  float scale;
  const float* mask;  // [samples, mask_rows, round_up(length, kMaskColumns)] or null
  int64_t mask_rows;  // 1 or length
};

class EncoderRun {
 public:
  // `layers` are at least one.
  EncoderRun(const EncoderArgs& args, const std::vector<EncoderLayer>& layers)
      : p_(args), layers_(layers), table_(kernels()), meeting_(kMeetings * (int64_t)layers.size()) {
    for (const EncoderLayer& layer : layers_) widest_ = larger(widest_, layer.up.outputs);
    const double rows = (double)(p_.samples * p_.length);
    // Of one layer: threads meet within each.
    const double products = rows * (double)p_.width * (double)(4 * p_.width + 2 * widest_);
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
    attention_scratch_ = table_.attention_scratch_bytes(head(nullptr, nullptr, nullptr, nullptr, 0, 0));
  }

  void run() {
    std::atomic<int64_t> next_area{0};
    run_tasks(threads_, [&](int64_t) {
      char* area = nullptr;
      for (size_t i = 0; i < layers_.size(); ++i) {
        // The answers of a layer take the place of its inputs.
        const Call call = {layers_[i], i == 0 ? p_.x : p_.out};
        const int64_t meeting = kMeetings * (int64_t)i;
        meeting_.work(meeting, alone_, [&](int64_t number) {
          if (!area) area = kept_->memory() + next_area.fetch_add(1) * area_;
          const int64_t first = number * group_;
          run_alone(call, {first, smaller(group_, p_.samples - first), area});
        });
        if (shared_ > 0) {
          const Group rest = {alone_ * group_, shared_, kept_->memory() + smaller(alone_, threads_) * area_};
          run_shared(call, rest, meeting + 1);
        }
        meeting_.wait(meeting, alone_);
      }
    });
  }

 private:
  // Rows that go through the feed-forward part together: enough for each weight that is fetched.
  static constexpr int64_t kGroupRows = 128;
  static constexpr int kSteps = 10;
  static constexpr int kMeetings = kSteps + 1;  // in a layer: first that of the groups, then the steps that are shared

  struct Call {
    const EncoderLayer& layer;
    const void* x;  // what the layer reads
  };

  struct Group {
    int64_t first, samples;
    char* memory;
  };

  struct Buffers {
    float *query, *key, *value, *context, *sum, *hidden;  // [rows, width]
    float* wide;  // [chunk, outputs of the widest `up`]
    Codes codes;
    int64_t bytes;
  };

  Buffers carve(char* base, int64_t rows, int64_t chunk) const {
    Carver take(base);
    Buffers b;
    b.query = take.floats(rows * p_.width);
    b.key = take.floats(rows * p_.width);
    b.value = take.floats(rows * p_.width);
    // What attention answers replaces the queries; after it keys and values are not needed.
    b.context = b.query;
    b.sum = b.key;
    b.hidden = b.value;
    b.wide = take.floats(chunk * widest_);
    b.codes = take.codes(rows, larger(p_.width, widest_));
    b.bytes = take.bytes();
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

  void normalize(const EncoderNorm& norm, const float* x, const float* residual, float* out, const Piece& piece) const {
    table_.add_norm({x, residual, p_.width, norm.weight, norm.bias, norm.eps, out}, piece.begin, piece.end);
  }

  // Steps 0 to 2 are for all rows of a group, 3 to 9 for a chunk of `rows` rows that starts at `from`.
  void step(int number, const Call& call, const Group& g, const Buffers& b, int64_t from, int64_t rows,
            const Piece& piece) const {
    const EncoderLayer& layer = call.layer;
    const int64_t start = g.first * p_.length + from;
    switch (number) {
      case 0: return quantize(table_, rows_at(call.x, start), p_.dtype, p_.width, b.codes, piece);
      case 1: {
        const PackedLayer* const layers[] = {&layer.query, &layer.key, &layer.value};
        float* const to[] = {b.query, b.key, b.value};
        return multiply_beside(table_, layers, to, 3, {nullptr, kFloat32, b.codes}, rows, piece);
      }
      case 2: return attend(g, b, piece);
      case 3: return quantize(table_, b.context + from * p_.width, kFloat32, p_.width, b.codes, piece);
      case 4: return multiply(table_, layer.output, b.codes, rows, b.sum, piece);
      case 5:
        normalize(layer.attention_norm, b.sum, residual(call.x, start, b, piece), b.hidden, piece);
        return quantize(table_, b.hidden, kFloat32, p_.width, b.codes, piece);
      case 6: return multiply(table_, layer.up, b.codes, rows, b.wide, piece);
      case 7: return quantize(table_, b.wide, kFloat32, layer.up.outputs, b.codes, piece);
      case 8: return multiply(table_, layer.down, b.codes, rows, b.sum, piece);
      default: return answer(layer.output_norm, start, b, piece);
    }
  }

  char* rows_at(const void* x, int64_t row) const {
    return (char*)x + row * p_.width * (p_.dtype == kFloat32 ? 4 : 2);
  }

  // The layer's input as float32: as it is, or in the place of what is to become of it.
  const float* residual(const void* x, int64_t start, const Buffers& b, const Piece& piece) const {
    if (p_.dtype == kFloat32) return (const float*)rows_at(x, start);
    const int64_t count = (piece.end - piece.begin) * p_.width;
    table_.widen(rows_at(x, start + piece.begin), p_.dtype, b.hidden + piece.begin * p_.width, count);
    return b.hidden;
  }

  void answer(const EncoderNorm& norm, int64_t start, const Buffers& b, const Piece& piece) const {
    float* to = p_.dtype == kFloat32 ? (float*)rows_at(p_.out, start) : b.sum;
    normalize(norm, b.sum, b.hidden, to, piece);
    if (p_.dtype == kFloat32) return;
    const int64_t count = (piece.end - piece.begin) * p_.width;
    table_.narrow(b.sum + piece.begin * p_.width, rows_at(p_.out, start + piece.begin), p_.dtype, count);
  }

  // What the pieces of a step are ranges of.
  int64_t lines_of(int number, const Group& g, int64_t rows) const {
    if (number == 2) return g.samples * p_.heads;
    return number < 2 ? g.samples * p_.length : rows;
  }
  int64_t columns_of(int number, const Call& call) const {
    if (number == 1) return 3 * round_up(p_.width, 64);
    if (number == 4 || number == 8) return p_.width;
    return number == 6 ? call.layer.up.outputs : 1;
  }

  void run_alone(const Call& call, const Group& g) const {
    const int64_t rows = g.samples * p_.length;
    const Buffers b = carve(g.memory, group_ * p_.length, chunk_);
    for (int i = 0; i < 3; ++i) {
      step(i, call, g, b, 0, rows, {0, lines_of(i, g, rows), 0, columns_of(i, call)});
    }
    for (int64_t from = 0; from < rows; from += chunk_) {
      const int64_t count = smaller(chunk_, rows - from);
      for (int i = 3; i < kSteps; ++i) step(i, call, g, b, from, count, {0, count, 0, columns_of(i, call)});
    }
  }

  void run_shared(const Call& call, const Group& g, int64_t meeting) {
    const int64_t rows = g.samples * p_.length;
    const Buffers b = carve(g.memory, rows, rows);
    for (int i = 0; i < kSteps; ++i) {
      const Division d(lines_of(i, g, rows), columns_of(i, call), threads_);
      meeting_.share(meeting + i, d.pieces(), [&](int64_t n) { step(i, call, g, b, 0, rows, d.piece(n)); });
    }
  }

  const EncoderArgs p_;
  const std::vector<EncoderLayer>& layers_;
  const KernelTable& table_;
  int64_t widest_ = 0;
  int64_t threads_ = 1;
  int64_t group_ = 1;  // samples that a thread takes at once
  int64_t alone_ = 0;  // such groups
  int64_t shared_ = 0;  // samples that are left
  int64_t chunk_ = 1;
  int64_t area_ = 0;
  int64_t attention_scratch_ = 0;
  std::unique_ptr<KeptMemory> kept_;
  Meetings meeting_;
};

}  // namespace mono_quant
