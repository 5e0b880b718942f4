// Layers of a decoder of the Llama family, one after the other: attention with rotary positions and a cache, and a gated
// feed-forward part, both behind root-mean-square norms, with linear layers of int8 or of few-bit weights.
//
// Many rows are divided into chunks that a thread takes through all steps between two meetings; few rows (one token) are
// taken through the steps together, each thread with columns of its own, meeting after each step. Threads meet by
// spinning and take their pieces from counters: one that comes late finds nothing left to do.
//
// All is computed in float32. With bfloat16 what goes to the cache, what leaves a layer and what layers of few-bit weights
// read is rounded.
#pragma once

#include <array>
#include <initializer_list>
#include <vector>

#include "packed_layer.h"

namespace mono_quant {

struct DecoderLayer {
  PackedLayer query, key, value, output, gate, up, down;
  const float *attention_norm, *output_norm;  // [width]
  float attention_eps, output_eps;
  int64_t past;  // tokens before those of `x`
  int64_t seen;  // keys that are attended to: past + length, or more where the mask shows more
  // Where keys and values of `x` go, behind those of the past [samples, key_heads, at least past + length, depth].
  char *keys, *values;
  int64_t sample_stride, head_stride;
  // Those of the past [samples, key_heads, past, depth] where they are elsewhere and have to be copied, or null.
  const char *past_keys, *past_values;
  int64_t past_sample_stride, past_head_stride;

  // In the order of the operators' weights.
  std::array<PackedLayer*, 7> linears() { return {&query, &key, &value, &output, &gate, &up, &down}; }
};

// What the layers have in common.
struct DecoderArgs {
  DType dtype;  // of x, out, and keys and values in the cache: float32 or bfloat16
  const void* x;  // [samples, length, width]
  void* out;
  int64_t samples, length, width, heads, key_heads, depth;
  const float *cosine, *sine;  // [samples or 1, length, depth]
  int64_t angle_stride;  // from one sample to the next, or 0
  float scale;
  bool causal;
  const float* mask;  // [samples, mask_rows, mask_stride], at least round_up(seen, kMaskColumns) wide, or null
  int64_t mask_rows, mask_stride;
};

class DecoderRun {
 public:
  // `layers` are at least one, with heads of the same sizes.
  DecoderRun(const DecoderArgs& args, const std::vector<DecoderLayer>& layers)
      : p_(args), layers_(layers), table_(kernels()), rows_(p_.samples * p_.length),
        meeting_(kMeetings * (int)layers.size()) {
    int64_t seen = 0;
    for (const DecoderLayer& layer : layers_) {
      seen = larger(seen, layer.seen);
      hidden_ = larger(hidden_, layer.up.outputs);
    }
    const double weights = (double)p_.width * (double)((2 * p_.heads + 2 * p_.key_heads) * p_.depth) +
                           3. * (double)p_.width * (double)hidden_;
    const double attention = 2. * (double)rows_ * (double)seen * (double)(p_.heads * p_.depth);
    // Of one layer: threads meet within each. The weights come from memory; multiply-adds of attention are float32 ones,
    // about an eighth as fast.
    threads_ = worthwhile_threads(((double)rows_ * weights + 8 * attention) / table_.speed + weights / 25e3);
    chunked_ = rows_ >= kChunkRows / 2 * threads_;
    chunk_ = chunked_ ? smaller(kChunkRows, round_up((rows_ + threads_ - 1) / threads_, 32)) : rows_;
    const int64_t queries = round_up(rows_ * p_.heads * p_.depth * 4, 64);
    const int64_t states = is_float() ? 0 : round_up(rows_ * p_.width * 4, 64);
    const int64_t area = carve(nullptr, chunk_).bytes;
    kept_ = std::make_unique<KeptMemory>(queries + states + area * (chunked_ ? threads_ : 1));
    queries_ = (float*)kept_->memory();
    x_ = is_float() ? (const float*)p_.x : (const float*)(kept_->memory() + queries);
    out_ = is_float() ? (float*)p_.out : (float*)(kept_->memory() + queries);
    areas_ = kept_->memory() + queries + states;
    area_ = area;
  }

  void run() {
    if (!is_float()) table_.widen(p_.x, p_.dtype, out_, rows_ * p_.width);
    run_layers();
    if (!is_float()) table_.narrow(out_, p_.out, p_.dtype, rows_ * p_.width);
  }

 private:
  void run_layers() {
    std::atomic<int64_t> next_area{0};
    run_tasks(threads_, [&](int64_t) {
      Buffers b = carve(areas_ + (chunked_ ? next_area.fetch_add(1) : 0) * area_, chunk_);
      int meeting = 0;
      for (size_t i = 0; i < layers_.size(); ++i) {
        // The answers of a layer take the place of its inputs, and the next one starts with the rows that are at hand.
        const Call now = {layers_[i], i == 0 ? x_ : out_, b};
        const bool last = i + 1 == layers_.size();
        const Call next = {layers_[last ? i : i + 1], out_, b};
        if (chunked_) run_chunked(now, next, i == 0, last, &meeting);
        else run_shared(now, next, i == 0, last, &meeting);
      }
    });
  }

  static constexpr int64_t kChunkRows = 128;
  static constexpr int kMeetings = 12;

  enum Step { kNormed, kProjected, kScattered, kContext, kOutput, kHidden, kGated, kProduct, kDown, kAnswer };

  struct Buffers {
    float *key, *value;  // [rows, key heads * depth]
    float *sum, *hidden, *normed;  // [rows, width]
    float *gate, *up;  // [rows, outputs of `up`]
    uint16_t* rounded;  // rows that layers of few-bit weights read
    Codes codes;
    int64_t bytes;
  };

  struct Call {
    const DecoderLayer& layer;
    const float* x;  // what the layer reads
    const Buffers& buffers;
  };

  Buffers carve(char* base, int64_t rows) const {
    Carver take(base);
    Buffers b;
    b.key = take.floats(rows * p_.key_heads * p_.depth);
    b.value = take.floats(rows * p_.key_heads * p_.depth);
    b.sum = take.floats(rows * p_.width);
    b.hidden = take.floats(rows * p_.width);
    b.normed = take.floats(rows * p_.width);
    b.gate = take.floats(rows * hidden_);
    b.up = take.floats(rows * hidden_);
    const int64_t widest = larger(larger(p_.width, hidden_), p_.heads * p_.depth);
    b.rounded = is_float() ? nullptr : (uint16_t*)take.take(rows * widest * 2);
    b.codes = take.codes(rows, widest);
    b.bytes = take.bytes();
    return b;
  }

  bool is_float() const { return p_.dtype == kFloat32; }
  int64_t element_size() const { return is_float() ? 4 : 2; }
  int64_t chunks() const { return (rows_ + chunk_ - 1) / chunk_; }

  void run_chunked(const Call& now, const Call& next, bool first, bool last, int* meeting) {
    if (first) meeting_.share((*meeting)++, chunks(), [&](int64_t i) { for_chunk(now, i, kNormed, kScattered); });
    meeting_.share((*meeting)++, attention_pieces(), [&](int64_t i) { attend(now.layer, i); });
    meeting_.share((*meeting)++, chunks(), [&](int64_t i) {
      for_chunk(now, i, kContext, kAnswer);
      if (!last) for_chunk(next, i, kNormed, kScattered);
    });
  }

  void for_chunk(const Call& call, int64_t i, Step first, Step last) const {
    const int64_t from = i * chunk_, rows = smaller(chunk_, rows_ - from);
    for (int step = first; step <= last; ++step) {
      run_step((Step)step, call, from, rows, {0, rows, 0, columns_of((Step)step, call.layer)});
    }
  }

  void run_shared(const Call& now, const Call& next, bool first, bool last, int* meeting) {
    if (first) share_step((*meeting)++, now, kNormed);
    share_step((*meeting)++, now, kProjected);
    share_step((*meeting)++, now, kScattered);
    meeting_.share((*meeting)++, attention_pieces(), [&](int64_t i) { attend(now.layer, i); });
    for (int step = kContext; step <= kDown; ++step) share_step((*meeting)++, now, (Step)step);
    const Division d(rows_, 1, threads_);
    meeting_.share((*meeting)++, d.pieces(), [&](int64_t i) {
      run_step(kAnswer, now, 0, rows_, d.piece(i));
      if (!last) run_step(kNormed, next, 0, rows_, d.piece(i));
    });
  }

  void share_step(int meeting, const Call& call, Step step) {
    const Division d(rows_, columns_of(step, call.layer), threads_);
    meeting_.share(meeting, d.pieces(), [&](int64_t i) { run_step(step, call, 0, rows_, d.piece(i)); });
  }

  // Columns that can be computed apart; 1 for what takes whole rows.
  int64_t columns_of(Step step, const DecoderLayer& layer) const {
    switch (step) {
      case kProjected: return round_up(layer.query.outputs, 64) + 2 * round_up(layer.key.outputs, 64);
      case kOutput: case kDown: return p_.width;
      case kGated: return 2 * round_up(layer.up.outputs, 64);
      default: return 1;
    }
  }

  // A step for `rows` rows from `from` on; the piece counts rows from there.
  void run_step(Step step, const Call& call, int64_t from, int64_t rows, const Piece& piece) const {
    const DecoderLayer& layer = call.layer;
    const Buffers& b = call.buffers;
    const float* x = call.x + from * p_.width;
    float* query = queries_ + from * layer.query.outputs;
    switch (step) {
      case kNormed:
        table_.rms_norm({x, nullptr, p_.width, layer.attention_norm, layer.attention_eps, nullptr, b.normed},
                        piece.begin, piece.end);
        return prepare_for({&layer.query, &layer.key, &layer.value}, b.normed, b, piece);
      case kProjected: {
        const PackedLayer* const layers[] = {&layer.query, &layer.key, &layer.value};
        float* const to[] = {query, b.key, b.value};
        return multiply_beside(table_, layers, to, 3, input(b.normed, b), rows, piece);
      }
      case kScattered: return scatter(layer, b, from, piece);
      case kContext: return prepare_for({&layer.output}, query, b, piece);
      case kOutput: return multiply(table_, layer.output, input(query, b), rows, b.sum, piece);
      case kHidden:
        table_.rms_norm({b.sum, x, p_.width, layer.output_norm, layer.output_eps, b.hidden, b.normed}, piece.begin,
                        piece.end);
        return prepare_for({&layer.gate, &layer.up}, b.normed, b, piece);
      case kGated: {
        const PackedLayer* const layers[] = {&layer.gate, &layer.up};
        float* const to[] = {b.gate, b.up};
        return multiply_beside(table_, layers, to, 2, input(b.normed, b), rows, piece);
      }
      case kProduct: {
        const int64_t at = piece.begin * layer.up.outputs;
        table_.multiply(b.gate + at, b.up + at, (piece.end - piece.begin) * layer.up.outputs);
        return prepare_for({&layer.down}, b.gate, b, piece);
      }
      case kDown: return multiply(table_, layer.down, input(b.gate, b), rows, b.sum, piece);
      default: {
        const int64_t at = piece.begin * p_.width, count = (piece.end - piece.begin) * p_.width;
        table_.add(b.hidden + at, b.sum + at, out_ + from * p_.width + at, count);
        return round(out_ + from * p_.width + at, count);
      }
    }
  }

  // The codes of rows `x`, if one of the layers that read them is one of tiles; the rows rounded, if one is of words.
  void prepare_for(std::initializer_list<const PackedLayer*> layers, const float* x, const Buffers& to,
                   const Piece& piece) const {
    bool tiles = false, words = false;
    for (const PackedLayer* layer : layers) (layer->packed ? tiles : words) = true;
    const int64_t width = (*layers.begin())->inputs, at = piece.begin * width;
    if (tiles) quantize(table_, x, kFloat32, width, to.codes, piece);
    if (words && !is_float()) {
      table_.narrow(x + at, to.rounded + at, p_.dtype, (piece.end - piece.begin) * width);
    }
  }
  LinearInput input(const float* x, const Buffers& b) const {
    if (is_float()) return {x, kFloat32, b.codes};
    return {b.rounded, p_.dtype, b.codes};
  }

  // Values in place to what the dtype holds.
  void round(float* x, int64_t count) const {
    if (is_float()) return;
    uint16_t some[512];
    for (int64_t i = 0; i < count; i += 512) {
      table_.narrow(x + i, some, p_.dtype, smaller(512, count - i));
      table_.widen(some, p_.dtype, x + i, smaller(512, count - i));
    }
  }

  // Positions into queries and keys; keys and values to their places behind those of the past.
  void scatter(const DecoderLayer& layer, const Buffers& b, int64_t from, const Piece& piece) const {
    const int64_t depth = p_.depth;
    for (int64_t r = piece.begin; r < piece.end; ++r) {
      const int64_t sample = (from + r) / p_.length, position = (from + r) % p_.length;
      const int64_t angle = sample * p_.angle_stride + position * depth;
      float* query = queries_ + (from + r) * layer.query.outputs;
      table_.rotate(query, p_.heads, depth, p_.cosine + angle, p_.sine + angle);
      table_.rotate(b.key + r * layer.key.outputs, p_.key_heads, depth, p_.cosine + angle, p_.sine + angle);
      for (int64_t h = 0; h < p_.key_heads; ++h) {
        const int64_t to = sample * layer.sample_stride + h * layer.head_stride + (layer.past + position) * depth;
        const int64_t head = r * layer.key.outputs + h * depth;
        table_.narrow(b.key + head, layer.keys + to * element_size(), p_.dtype, depth);
        table_.narrow(b.value + head, layer.values + to * element_size(), p_.dtype, depth);
      }
    }
  }

  // A piece is a sample and a head of keys: its past is copied, if it must be, by whoever takes it, and met by all heads
  // of queries that share it.
  int64_t attention_pieces() const { return p_.samples * p_.key_heads; }

  void attend(const DecoderLayer& layer, int64_t piece) const {
    const int64_t sample = piece / p_.key_heads, head = piece % p_.key_heads, group = p_.heads / p_.key_heads;
    const int64_t size = element_size(), to = (sample * layer.sample_stride + head * layer.head_stride) * size;
    if (layer.past_keys && layer.past > 0) {
      const int64_t past = (sample * layer.past_sample_stride + head * layer.past_head_stride) * size;
      memcpy(layer.keys + to, layer.past_keys + past, (size_t)(layer.past * p_.depth * size));
      memcpy(layer.values + to, layer.past_values + past, (size_t)(layer.past * p_.depth * size));
    }
    AttentionArgs a = {};
    a.k = layer.keys + to;
    a.v = layer.values + to;
    a.kv_dtype = p_.dtype;
    a.k_stride = a.v_stride = p_.depth;
    a.keys = layer.seen;
    a.depth = p_.depth;
    a.scale = p_.scale;
    if (p_.mask) {
      a.mask = p_.mask + sample * p_.mask_rows * p_.mask_stride;
      a.mask_stride = p_.mask_rows == 1 ? 0 : p_.mask_stride;
    }
    float* query = queries_ + sample * p_.length * layer.query.outputs + head * group * p_.depth;
    if (p_.length == 1) {
      // The heads of one token lie side by side: they are the queries.
      a.queries = group;
      a.q = a.out = query;
      a.q_stride = a.out_stride = p_.depth;
      a.mask_stride = 0;
      return attend(a);
    }
    a.queries = p_.length;
    a.causal = p_.causal;
    a.q_stride = a.out_stride = layer.query.outputs;
    for (int64_t i = 0; i < group; ++i) {
      a.q = a.out = query + i * p_.depth;
      attend(a);
    }
  }

  // What attention answers replaces the queries.
  void attend(const AttentionArgs& a) const {
    const ThreadScratch scratch(table_.attention_scratch_bytes(a));
    table_.attention(a, scratch.get());
  }

  const DecoderArgs p_;
  const std::vector<DecoderLayer>& layers_;
  const KernelTable& table_;
  const int64_t rows_;
  int64_t hidden_ = 0;  // the widest feed-forward part
  int64_t threads_ = 1;
  bool chunked_ = false;
  int64_t chunk_ = 1;
  std::unique_ptr<KeptMemory> kept_;
  float* queries_ = nullptr;  // [rows, heads * depth]
  // [rows, width]: those of the arguments, or float32 ones that stand for them.
  const float* x_ = nullptr;
  float* out_ = nullptr;
  char* areas_ = nullptr;
  int64_t area_ = 0;
  Meetings meeting_;
};

}  // namespace mono_quant
