// Attention of one head: softmax(q k^T * scale + mask) v in float32, for any number of lanes. Keys and values may be
// bfloat16.
//
// Keys are transposed once, so that scores come out side by side; six queries share each load of keys and values, whose
// scores stay in the first-level cache from the product to the sum over values. Bound: the rate of multiply-adds, with an
// exponential (about 14 instructions for a vector) beside every 2 * depth of them.

namespace {

using mono_quant::AttentionArgs;

constexpr int64_t kQueryRows = 6;
// For so few, keys that are transposed in memory are not read often enough.
constexpr int64_t kFewQueries = 3;
constexpr int kScoreVectors = kLanes == 16 ? 4 : 2;
// Scores are computed for whole blocks of keys; those behind the last key are masked.
constexpr int64_t kKeyBlock = kScoreVectors * kLanes, kKeyStep = kKeyBlock / 2;

inline int64_t padded_keys(const AttentionArgs& p) { return mono_quant::round_up(p.keys, kKeyBlock); }
inline int64_t padded_width(const AttentionArgs& p) { return mono_quant::round_up(p.depth, kLanes); }

struct AttentionScratch {
  float* keys;  // [depth, padded keys]: transposed
  float* values;  // [keys, padded width], where they are not read as they are
  float* scores;  // [kQueryRows, padded keys]
  int64_t bytes;
};

// Whether values are copied: to whole vectors, or to float32 where they are read many times.
inline bool copies_values(const AttentionArgs& p) {
  return padded_width(p) != p.depth || (p.kv_dtype != mono_quant::kFloat32 && p.queries > kFewQueries);
}

inline AttentionScratch attention_scratch(const AttentionArgs& p, char* base) {
  const int64_t columns = padded_keys(p), width = padded_width(p);
  const int64_t keys = width * columns, values = copies_values(p) ? p.keys * width : 0;
  float* f = (float*)base;
  return {f, f + keys, f + keys + values, (keys + values + kQueryRows * columns) * (int64_t)sizeof(float)};
}

int64_t attention_scratch_bytes(const AttentionArgs& p) { return attention_scratch(p, nullptr).bytes; }

// Elements of keys in a dword.
template <int kType>
constexpr int64_t kKeysInDword = 4 / element_size<kType>();

// One of them, for each lane.
template <int kType>
inline F32 key_in_dword(I32 dword, int64_t i) {
  if (kType == mono_quant::kFloat32) return bits_to_f32(dword);
  return bits_to_f32(i == 0 ? shift_left<16>(dword) : and_i32(dword, splat_i32((int32_t)0xffff0000u)));
}

// kLanes dwords, from element `d` on, of up to kLanes keys from `key` on, one lane for each key.
template <int kType>
inline void load_keys(const AttentionArgs& p, int64_t key, int64_t rows, int64_t d, I32 block[kLanes]) {
  constexpr int64_t kSize = element_size<kType>();
  const char* from = (const char*)p.k + (key * p.k_stride + d) * kSize;
  load_transposed(from, p.k_stride * kSize, rows, (p.depth - d) * kSize, block);
}

template <int kType>
void transpose_keys(const AttentionArgs& p, float* to) {
  constexpr int64_t kStep = kLanes * kKeysInDword<kType>;
  const int64_t columns = padded_keys(p), width = padded_width(p);
  for (int64_t key = 0; key < columns; key += kLanes) {
    const int64_t rows = mono_quant::smaller(kLanes, p.keys - key);
    for (int64_t d = 0; d < width; d += kStep) {
      I32 block[kLanes];
      if (rows > 0) {
        load_keys<kType>(p, key, rows, d, block);
      } else {
        for (int i = 0; i < kLanes; ++i) block[i] = splat_i32(0);
      }
      const int64_t count = mono_quant::smaller(kStep, width - d);
      for (int64_t i = 0; i < count; ++i) {
        const F32 v = key_in_dword<kType>(block[i / kKeysInDword<kType>], i % kKeysInDword<kType>);
        store_f32(to + (d + i) * columns + key, v);
      }
    }
  }
}

template <int kType>
void pad_values(const AttentionArgs& p, float* to) {
  const int64_t width = padded_width(p);
  for (int64_t key = 0; key < p.keys; ++key, to += width) {
    widen_typed<kType>((const char*)p.v + key * p.v_stride * element_size<kType>(), to, p.depth);
    for (int64_t d = p.depth; d < width; ++d) to[d] = 0.f;
  }
}

// e^v for v <= 0, zero for minus infinity, NaN for NaN: the polynomial of `exponential`, a single power of two.
inline F32 softmax_exponential(F32 v) {
  const F32 inside = max_keep(splat(-87.3f), v);
  const I32 n = round_to_i32(mul(inside, splat(1.44269504f)));
  const F32 nf = to_f32(n);
  F32 r = fma(nf, splat(-0.693359375f), inside);
  r = fma(nf, splat(2.12194440e-4f), r);
  F32 e = splat(0.008368710055947304f);
  e = fma(e, r, splat(0.04166838899254799f));
  e = fma(e, r, splat(0.1666652113199234f));
  e = fma(e, r, splat(0.4999999403953552f));
  e = fma(mul(e, r), r, r);
  e = mul(add(e, splat(1.f)), bits_to_f32(shift_left<23>(add_i32(n, splat_i32(127)))));
  return select_negative(add(v, splat(87.3f)), splat(0.f), e);
}

inline float sum_of_lanes(F32 v) {
  alignas(64) float lanes[kLanes];
  store_f32(lanes, v);
  float sum = 0.f;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// Scores of some queries for kVectors vectors of keys.
template <int kRows, int kVectors>
inline void block_scores(const float* q, int64_t q_stride, int64_t depth, const float* keys, int64_t columns,
                         float* scores) {
  F32 sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) sum[r][c] = splat(0.f);
  }
  for (int64_t d = 0; d < depth; ++d) {
    F32 k[kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) k[c] = load_f32(keys + d * columns + c * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const F32 x = splat(q[r * q_stride + d]);
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) sum[r][c] = fma(x, k[c], sum[r][c]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) store_f32(scores + r * columns + c * kLanes, sum[r][c]);
  }
}

template <int kRows>
void query_scores(const float* q, int64_t q_stride, int64_t depth, const float* keys, int64_t columns, int64_t end,
                  float* scores) {
  int64_t key = 0;
  for (; key + kKeyBlock <= end; key += kKeyBlock) {
    block_scores<kRows, kScoreVectors>(q, q_stride, depth, keys + key, columns, scores + key);
  }
  for (; key < end; key += kKeyStep) {
    block_scores<kRows, kScoreVectors / 2>(q, q_stride, depth, keys + key, columns, scores + key);
  }
}

// Scores to weights that are not divided by their sums yet, and the inverses of these. Of each query only the first
// `visible` keys are seen; weights up to `end`, a multiple of kKeyStep, are written. The queries side by side hide the
// latency of each other's exponentials.
template <int kRows>
inline void soften(float* scores, int64_t columns, const int64_t* visible, int64_t end, float scale,
                   const float* const* mask, float* inverse) {
  const float none = -__builtin_inff();
  F32 highest[kRows], shift[kRows], sum[kRows];
  for (int r = 0; r < kRows; ++r) {
    for (int64_t i = visible[r]; i < end; ++i) scores[r * columns + i] = none;
    highest[r] = splat(none);
    sum[r] = splat(0.f);
  }
  for (int64_t i = 0; i < end; i += kLanes) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      F32 v = mul(load_f32(scores + r * columns + i), splat(scale));
      if (mask[r]) v = add(v, load_f32(mask[r] + i));
      store_f32(scores + r * columns + i, v);
      highest[r] = max_keep(highest[r], v);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const float most = highest_lane(highest[r]);
    // A query that sees nothing answers zeros.
    shift[r] = splat(most == none ? 0.f : most);
  }
  for (int64_t i = 0; i < end; i += kLanes) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const F32 e = softmax_exponential(sub(load_f32(scores + r * columns + i), shift[r]));
      store_f32(scores + r * columns + i, e);
      sum[r] = add(sum[r], e);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const float total = sum_of_lanes(sum[r]);
    inverse[r] = total == 0.f ? 0.f : 1.f / total;
  }
}

// The same for few queries: keys are transposed in registers, a block of kLanes at a time, and met at once.
template <int kType, int kRows>
void direct_scores(const AttentionArgs& p, const float* q, int64_t columns, int64_t end, float* scores) {
  constexpr int64_t kSize = element_size<kType>(), kStep = kLanes * kKeysInDword<kType>;
  for (int64_t key = 0; key < end; key += kLanes) {
    const int64_t rows = mono_quant::smaller(kLanes, p.keys - key);
    F32 sum[2][kRows];
    for (int r = 0; r < kRows; ++r) sum[0][r] = sum[1][r] = splat(0.f);
    for (int64_t d = 0; d < p.depth && rows > 0; d += kStep) {
      I32 block[kLanes];
      load_keys<kType>(p, key, rows, d, block);
      // A share of the next block, in its order in memory: blocks are read a column of vectors at a time, which not
      // every processor foresees. All at once they would wait for each other.
      for (int64_t i = d * kLanes / p.depth; i < (d + kStep) * kLanes / p.depth; ++i) {
        const char* next = (const char*)p.k + (key + kLanes + i) * p.k_stride * kSize;
        for (int64_t byte = 0; byte < p.depth * kSize; byte += 64) __builtin_prefetch(next + byte);
      }
      const int64_t count = mono_quant::smaller(kStep, p.depth - d);
#pragma GCC unroll 32
      for (int64_t i = 0; i < kStep; ++i) {
        if (i >= count) break;
        const F32 k = key_in_dword<kType>(block[i / kKeysInDword<kType>], i % kKeysInDword<kType>);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[i & 1][r] = fma(splat(q[r * p.q_stride + d + i]), k, sum[i & 1][r]);
      }
    }
    for (int r = 0; r < kRows; ++r) store_f32(scores + r * columns + key, add(sum[0][r], sum[1][r]));
  }
}

template <int kType, int kRows, int kVectors>
void weighted_values(const float* weights, int64_t columns, int64_t keys, const void* values, int64_t v_stride,
                     const float* inverse, float* out, int64_t out_stride, int64_t width) {
  const char* v = (const char*)values;
  F32 sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) sum[r][c] = splat(0.f);
  }
  for (int64_t key = 0; key < keys; ++key, v += v_stride * element_size<kType>()) {
    F32 x[kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) x[c] = load_x<kType>(v, c * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const F32 w = splat(weights[r * columns + key]);
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) sum[r][c] = fma(w, x[c], sum[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    alignas(64) float row[kVectors * kLanes];
    for (int c = 0; c < kVectors; ++c) store_f32(row + c * kLanes, mul(sum[r][c], splat(inverse[r])));
    memcpy(out + r * out_stride, row, (size_t)width * 4);
  }
}

// What the queries from `first` on answer, from values [keys, v_stride] of whole vectors.
template <int kType, int kRows>
void sum_values(const AttentionArgs& p, const float* scores, int64_t keys, const void* v, int64_t v_stride,
                const float* inverse, int64_t first) {
  const int64_t columns = padded_keys(p), width = padded_width(p);
  for (int64_t d = 0; d < width;) {
    const int64_t vectors = mono_quant::smaller(kScoreVectors, (width - d) / kLanes);
    const int64_t count = mono_quant::smaller(vectors * kLanes, p.depth - d);
    const char* from = (const char*)v + d * element_size<kType>();
    float* out = p.out + first * p.out_stride + d;
    const auto sum = [&](auto run) { run(scores, columns, keys, from, v_stride, inverse, out, p.out_stride, count); };
    if (vectors == 4) sum(weighted_values<kType, kRows, kScoreVectors>);
    else if (vectors == 3) sum(weighted_values<kType, kRows, 3>);
    else if (vectors == 2) sum(weighted_values<kType, kRows, 2>);
    else sum(weighted_values<kType, kRows, 1>);
    d += vectors * kLanes;
  }
}

template <int kType, int kRows>
void query_block(const AttentionArgs& p, const AttentionScratch& s, int64_t first) {
  const int64_t columns = padded_keys(p);
  // With a causal mask a query sees itself and what lies before; the last query sees all keys.
  const int64_t seen = p.causal ? p.keys - p.queries + first + 1 : p.keys;
  const int64_t most = p.causal ? mono_quant::smaller(p.keys, seen + kRows - 1) : p.keys;
  const int64_t end = mono_quant::round_up(mono_quant::larger(most, 0), kKeyStep);
  const float* q = p.q + first * p.q_stride;
  if (p.queries <= kFewQueries) direct_scores<kType, kRows>(p, q, columns, end, s.scores);
  else query_scores<kRows>(q, p.q_stride, p.depth, s.keys, columns, end, s.scores);
  float inverse[kRows];
  int64_t visible[kRows];
  const float* mask[kRows];
  for (int r = 0; r < kRows; ++r) {
    visible[r] = p.causal ? mono_quant::smaller(p.keys, mono_quant::larger(0, seen + r)) : p.keys;
    mask[r] = p.mask ? p.mask + (first + r) * p.mask_stride : nullptr;
  }
  soften<kRows>(s.scores, columns, visible, end, p.scale, mask, inverse);
  const int64_t keys = mono_quant::larger(most, 0);
  if (copies_values(p)) {
    sum_values<mono_quant::kFloat32, kRows>(p, s.scores, keys, s.values, padded_width(p), inverse, first);
  } else {
    sum_values<kType, kRows>(p, s.scores, keys, p.v, p.v_stride, inverse, first);
  }
}

template <int kType>
void attention_typed(const AttentionArgs& p, const AttentionScratch& s) {
  if (p.queries > kFewQueries) transpose_keys<kType>(p, s.keys);
  if (copies_values(p)) pad_values<kType>(p, s.values);
  int64_t first = 0;
  for (; first + kQueryRows <= p.queries; first += kQueryRows) query_block<kType, kQueryRows>(p, s, first);
  for (; first + 3 <= p.queries; first += 3) query_block<kType, 3>(p, s, first);
  for (; first + 2 <= p.queries; first += 2) query_block<kType, 2>(p, s, first);
  if (first < p.queries) query_block<kType, 1>(p, s, first);
}

void attention(const AttentionArgs& p, void* scratch) {
  const AttentionScratch s = attention_scratch(p, (char*)scratch);
  if (p.kv_dtype == mono_quant::kBFloat16) attention_typed<mono_quant::kBFloat16>(p, s);
  else attention_typed<mono_quant::kFloat32>(p, s);
}

}  // namespace
