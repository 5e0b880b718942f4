// What whole layers of transformers are made of: packed linear layers on rows in memory that the threads share, steps
// divided into pieces, and threads that meet between steps.
#pragma once

#include <string.h>

#include "isa.h"
#include "kept_memory.h"
#include "meetings.h"
#include "parallel.h"

namespace mono_quant {

struct PackedLayer {
  const int8_t* packed;  // int8 tiles, multiplied with the codes of rows, or null
  const int32_t* column_sum;
  const float* weight_scale;  // [outputs, groups]; with tiles a group is all inputs
  const int8_t* weight_zero_point;  // the same, or null
  const float* bias;
  int64_t inputs, outputs;
  Activation activation;
  const void* words;  // without tiles: rows of 4- or 8-bit values, multiplied with the rows themselves
  int bits;
  int64_t row_bytes, group_size;
  int64_t groups() const { return packed ? 1 : inputs / group_size; }
};

// A range of rows and of columns.
struct Piece {
  int64_t begin, end, col_begin, col_end;
};

// Rows quantized for the products that read them.
struct Codes {
  uint8_t* codes;
  float* scale;
  int32_t* zero_point;
};

// Cuts memory into aligned arrays; without memory it counts.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  char* take(int64_t bytes) {
    char* piece = base_ ? base_ + at_ : nullptr;
    at_ += round_up(bytes, 64);
    return piece;
  }
  float* floats(int64_t count) { return (float*)take(count * 4); }
  // For rows of up to `width` codes; products read beyond the last.
  Codes codes(int64_t rows, int64_t width) {
    const int64_t stride = round_up(width, kPanelDepth);
    uint8_t* codes = (uint8_t*)take((rows + kReadablePastEnd) * stride);
    float* scale = floats(rows);
    return {codes, scale, (int32_t*)take(rows * 4)};
  }
  int64_t bytes() const { return at_; }

 private:
  char* base_;
  int64_t at_ = 0;
};

// What linear layers read: codes for those of tiles, the rows themselves for those of words.
struct LinearInput {
  const void* rows;
  DType dtype;
  Codes codes;
};

inline void quantize(const KernelTable& table, const void* x, DType dtype, int64_t width, const Codes& to,
                     const Piece& piece) {
  const int64_t stride = round_up(width, kPanelDepth);
  const char* from = (const char*)x + piece.begin * width * (dtype == kFloat32 ? 4 : 2);
  table.quantize_rows(from, dtype, width, piece.end - piece.begin, width,
                      to.codes + piece.begin * stride, stride, to.scale + piece.begin, to.zero_point + piece.begin);
}

inline void multiply(const KernelTable& table, const PackedLayer& layer, const Codes& x, int64_t rows, float* out,
                     const Piece& piece) {
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
  a.codes = x.codes;
  a.x_scale = x.scale;
  a.x_zero_point = x.zero_point;
  const ThreadScratch scratch(table.linear_scratch_bytes(a, piece.end - piece.begin));
  table.linear(a, piece.begin, piece.end, piece.col_begin, piece.col_end, scratch.get());
}

inline void multiply(const KernelTable& table, const PackedLayer& layer, const LinearInput& x, int64_t rows,
                     float* out, const Piece& piece) {
  if (layer.packed) return multiply(table, layer, x.codes, rows, out, piece);
  FloatLinearArgs a = {};
  a.x = x.rows;
  a.x_stride = a.k = layer.inputs;
  a.dtype = x.dtype;
  a.out_dtype = kFloat32;
  a.m = rows;
  a.n = layer.outputs;
  a.bits = layer.bits;
  a.weight = layer.words;
  a.row_bytes = layer.row_bytes;
  a.group_size = layer.group_size;
  a.weight_scale = layer.weight_scale;
  a.weight_zero_point = layer.weight_zero_point;
  a.bias = layer.bias;
  a.activation = layer.activation;
  a.out = out;
  const ThreadScratch scratch(table.float_linear_scratch_bytes(a, piece.end - piece.begin));
  table.float_linear(a, piece.begin, piece.end, piece.col_begin, piece.col_end, scratch.get());
}

// Layers that read the same rows, their columns side by side, each padded to a multiple of 64.
inline void multiply_beside(const KernelTable& table, const PackedLayer* const* layers, float* const* out, int count,
                            const LinearInput& x, int64_t rows, const Piece& piece) {
  int64_t first = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t begin = larger(piece.col_begin - first, 0);
    const int64_t end = smaller(piece.col_end - first, layers[i]->outputs);
    if (begin < end) multiply(table, *layers[i], x, rows, out[i], {piece.begin, piece.end, begin, end});
    first += round_up(layers[i]->outputs, 64);
  }
}

// A step divided into pieces for several threads. Products are divided by columns where rows are few: each piece then
// reads weights of its own.
class Division {
 public:
  Division(int64_t rows, int64_t columns, int64_t threads) : rows_(rows), columns_(columns) {
    const int64_t row_parts = columns > 1 ? smaller(threads, larger(1, rows / 64)) : smaller(rows, 2 * threads);
    row_step_ = (rows + row_parts - 1) / larger(row_parts, 1);
    col_step_ = columns > 1 ? column_step(row_parts, threads) : 1;
    across_ = (columns + col_step_ - 1) / col_step_;
  }
  int64_t pieces() const { return rows_ == 0 ? 0 : (rows_ + row_step_ - 1) / row_step_ * across_; }
  Piece piece(int64_t i) const {
    const int64_t row = i / across_ * row_step_, col = i % across_ * col_step_;
    return {row, smaller(rows_, row + row_step_), col, smaller(columns_, col + col_step_)};
  }

 private:
  // One or two pieces for each thread: as many as leave the least to the one that gets the most. Columns go in whole
  // tiles, of which narrow layers have few.
  int64_t column_step(int64_t row_parts, int64_t threads) const {
    // Few rows take as long as their weights: even pieces matter more than whole tiles.
    const int64_t whole = rows_ <= 4 ? 32 : 64;
    int64_t best = 0, least = 0;
    const int64_t fewest = larger(1, threads / row_parts);
    for (int64_t parts = larger(1, 2 * threads / row_parts), step = 0; parts >= fewest;
         parts = smaller(parts - 1, (columns_ - 1) / step)) {  // on to the next number that makes wider pieces
      step = round_up((columns_ + parts - 1) / parts, whole);
      const int64_t pieces = row_parts * ((columns_ + step - 1) / step);
      const int64_t most = (pieces + threads - 1) / threads * step;
      if (best > 0 && most >= least) continue;
      best = step;
      least = most;
    }
    return best;
  }

  int64_t rows_, columns_, row_step_, col_step_, across_;
};

}  // namespace mono_quant
