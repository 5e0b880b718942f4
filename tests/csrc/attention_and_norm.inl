// Attention of one head and the norm of a sum, against loops in double.

// What lies between the rows of an operand; a kernel that took it for data would answer NaN.
void fill(Buffer<float>& rows, int64_t count, int64_t width, int64_t stride) {
  for (int64_t i = 0; i < (count ? (count - 1) * stride + width : 0); ++i) rows[i] = i % stride < width ? normal() : NAN;
}

bool sees(const AttentionArgs& a, int64_t query, int64_t key) {
  return !a.causal || key <= a.keys - a.queries + query;
}

double element(const void* of, DType dtype, int64_t i) {
  return dtype == kFloat32 ? ((const float*)of)[i] : from_bf16(((const uint16_t*)of)[i]);
}

Buffer<uint16_t> rounded(Buffer<float>& values, int64_t count) {
  Buffer<uint16_t> to(count);
  for (int64_t i = 0; i < count; ++i) to[i] = std::isnan(values[i]) ? 0x7fc0 : to_bf16(values[i]);
  return to;
}

// One query's answer; answers how much rounding may move it.
double naive_attention(const AttentionArgs& a, int64_t query, std::vector<double>& out) {
  std::vector<double> scores((size_t)a.keys, -INFINITY);
  double highest = -INFINITY, largest = 0, total = 0;
  for (int64_t key = 0; key < a.keys; ++key) {
    if (!sees(a, query, key)) continue;
    double score = 0;
    for (int64_t i = 0; i < a.depth; ++i) {
      score += (double)a.q[query * a.q_stride + i] * element(a.k, a.kv_dtype, key * a.k_stride + i);
    }
    score *= a.scale;
    largest = std::fmax(largest, std::fabs(score));
    scores[(size_t)key] = score + (a.mask ? a.mask[query * a.mask_stride + key] : 0.f);
    // NaN stays, unlike in std::fmax.
    if (!(scores[(size_t)key] <= highest) && !std::isnan(highest)) highest = scores[(size_t)key];
  }
  out.assign((size_t)a.depth, 0);
  if (highest == -INFINITY) return 0;
  for (double& score : scores) total += score = std::exp(score - highest);
  double value = 0;
  for (int64_t i = 0; i < a.depth; ++i) {
    for (int64_t key = 0; key < a.keys; ++key) {
      const double v = element(a.v, a.kv_dtype, key * a.v_stride + i);
      out[(size_t)i] += scores[(size_t)key] / total * v;
      if (sees(a, query, key)) value = std::fmax(value, std::fabs(v));
    }
  }
  return 2e-6 * (1 + largest) * value;
}

void test_attention(const KernelTable& t, int64_t queries, int64_t keys, int64_t depth, int variant) {
  AttentionArgs a = {};
  a.queries = queries;
  a.keys = keys;
  a.depth = depth;
  a.q_stride = depth + (variant % 2 ? 0 : pick(1, 20));
  a.k_stride = depth + (variant % 3 ? pick(1, 20) : 0);
  a.v_stride = depth + (variant % 5 ? pick(1, 20) : 0);
  a.out_stride = depth + (variant % 7 ? pick(1, 20) : 0);
  a.scale = 1.f / std::sqrt((float)depth);
  a.causal = variant % 4 == 1;
  Buffer<float> q((queries - 1) * a.q_stride + depth), k((keys - 1) * a.k_stride + depth);
  Buffer<float> v((keys - 1) * a.v_stride + depth), out((queries - 1) * a.out_stride + depth, 64);
  fill(q, queries, depth, a.q_stride);
  fill(k, keys, depth, a.k_stride);
  fill(v, keys, depth, a.v_stride);
  if (variant % 11 == 7) k[pick(0, keys - 1) * a.k_stride + pick(0, depth - 1)] = NAN;
  // One row for all queries, or one for each; some keys are hidden, and from some queries all.
  const int64_t columns = round_up(keys, kMaskColumns), mask_rows = variant % 3 == 1 ? queries : 1;
  Buffer<float> mask(mask_rows * columns);
  for (int64_t r = 0; r < mask_rows; ++r) {
    for (int64_t i = 0; i < keys; ++i) {
      const bool hidden = (mask_rows > 1 && r % 5 == 4) || pick(0, 3) == 0;
      mask[r * columns + i] = hidden ? -INFINITY : normal();
    }
  }
  a.q = q.data();
  a.kv_dtype = variant % 13 < 6 ? kBFloat16 : kFloat32;
  Buffer<uint16_t> k16 = rounded(k, (keys - 1) * a.k_stride + depth), v16 = rounded(v, (keys - 1) * a.v_stride + depth);
  a.k = a.kv_dtype == kFloat32 ? (const void*)k.data() : k16.data();
  a.v = a.kv_dtype == kFloat32 ? (const void*)v.data() : v16.data();
  a.mask = variant % 3 == 2 ? nullptr : mask.data();
  a.mask_stride = mask_rows == 1 ? 0 : columns;
  a.out = out.data();
  const int64_t bytes = t.attention_scratch_bytes(a);
  Aligned scratch(bytes);
  t.attention(a, scratch.p);
  const std::string what = shape(t, "attention", queries, keys, depth, variant);
  expect(out.fenced(), what + " writes outside");
  std::vector<double> want;
  for (int64_t r = 0; r < queries; ++r) {
    const double allowed = naive_attention(a, r, want);
    for (int64_t i = 0; i < a.out_stride && r * a.out_stride + i < (queries - 1) * a.out_stride + depth; ++i) {
      const float got = out[r * a.out_stride + i];
      uint32_t bits;
      std::memcpy(&bits, &got, 4);
      if (i >= depth) expect(bits == 0xa5a5a5a5u, what + " writes between rows");
      else if (std::isnan(want[(size_t)i])) expect(std::isnan(got), what + " NaN");
      else expect(std::fabs(got - want[(size_t)i]) <= allowed, what);
    }
  }
}

// Rows [begin, end) of several; `out` is one of the operands for some variants.
void test_add_norm(const KernelTable& t, int64_t n, int variant) {
  const int64_t rows = 5, begin = variant % 2, end = rows - variant % 3 / 2;
  Buffer<float> x(rows * n, 64), residual(rows * n, 64), apart(rows * n, 64), weight(n), bias(n);
  const float size = std::ldexp(1.f, (int)pick(-8, 8)), shift = (float)pick(-2, 2) * size;
  for (int64_t i = 0; i < rows * n; ++i) x[i] = normal() * size + shift, residual[i] = normal() * size;
  for (int64_t i = 0; i < n; ++i) weight[i] = normal(), bias[i] = normal();
  if (variant % 5 == 3) x[begin * n + pick(0, n - 1)] = INFINITY;
  std::vector<float> x_before(x.data(), x.data() + rows * n), other(residual.data(), residual.data() + rows * n);
  Buffer<float>& out = variant % 3 == 0 ? apart : variant % 3 == 1 ? x : residual;
  std::vector<float> before(out.data(), out.data() + rows * n);
  const float eps = variant % 4 ? 1e-5f : 1e-12f;
  t.add_norm({x.data(), residual.data(), n, weight.data(), bias.data(), eps, out.data()}, begin, end);
  const std::string what = shape(t, "add_norm", rows, n, 0, variant);
  expect(x.fenced() && residual.fenced() && apart.fenced(), what + " writes outside");
  for (int64_t r = 0; r < rows; ++r) {
    if (r < begin || r >= end) {
      expect(!std::memcmp(out.data() + r * n, before.data() + r * n, (size_t)n * 4), what + " writes other rows");
      continue;
    }
    double mean = 0, variance = 0, largest = 0;
    const auto at = [&](int64_t i) { return (double)x_before[(size_t)(r * n + i)] + other[(size_t)(r * n + i)]; };
    for (int64_t i = 0; i < n; ++i) mean += at(i) / (double)n, largest = std::fmax(largest, std::fabs(at(i)));
    for (int64_t i = 0; i < n; ++i) variance += (at(i) - mean) * (at(i) - mean) / (double)n;
    const double factor = 1 / std::sqrt(variance + eps);
    for (int64_t i = 0; i < n; ++i) {
      const double want = (at(i) - mean) * factor * weight[i] + bias[i];
      const float got = out[r * n + i];
      if (std::isnan(want)) {
        expect(std::isnan(got), what + " NaN");
        continue;
      }
      // The mean is off by roundings of the largest element, which the division enlarges; so is the factor.
      const double centred = std::fabs(at(i) - mean);
      const double allowed = 1e-6 * ((largest + centred + centred * centred * factor) * factor * std::fabs(weight[i]) +
                                     std::fabs(bias[i])) + 1e-30;
      expect(std::fabs(got - want) <= allowed * std::fmax(1, std::sqrt((double)n) / 8), what);
    }
  }
}

void test_encoder_kernels(const KernelTable& t) {
  const int64_t lengths[] = {1, 2, 3, 4, 5, 6, 7, 13, 16, 17, 31, 33, 63, 64, 65, 70, 130};
  const int64_t depths[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 100, 128, 130};
  int variant = 0;
  for (const int64_t length : lengths) {
    for (const int64_t depth : depths) {
      const int64_t other = lengths[(variant * 7 + depth) % 17];
      test_attention(t, length, variant % 2 ? length : other, depth, variant);
      variant += 1;
    }
  }
  for (const int64_t n : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 384, 1000}) {
    for (int i = 0; i < 12; ++i) test_add_norm(t, n, i);
  }
}
