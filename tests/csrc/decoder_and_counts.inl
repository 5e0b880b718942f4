// What a decoder layer does between its products, and the counts of observers. Rotations, products and sums are rounded
// operation by operation, so they have the bits of a loop in float; counts are exact.

bool same(const float* a, const float* b, int64_t count) {
  return count == 0 || !std::memcmp(a, b, (size_t)count * 4);
}

// Rows [begin, end) of several; `sum` is absent, apart or one of the operands, `residual` may be absent.
void test_rms_norm(const KernelTable& t, int64_t n, int variant) {
  const int64_t rows = 5, begin = variant % 2, end = rows - variant % 3 / 2;
  Buffer<float> x(rows * n, 64), residual(rows * n, 64), apart(rows * n, 64), out(rows * n, 64), weight(n, 64);
  const float size = std::ldexp(1.f, (int)pick(-8, 8));
  for (int64_t i = 0; i < rows * n; ++i) x[i] = normal() * size, residual[i] = normal() * size;
  for (int64_t i = 0; i < n; ++i) weight[i] = normal();
  if (variant % 5 == 3) x[begin * n + pick(0, n - 1)] = variant % 10 == 3 ? INFINITY : NAN;
  if (variant % 7 == 6) for (int64_t i = 0; i < n; ++i) x[begin * n + i] = residual[begin * n + i] = 0;
  const bool added = variant % 4 != 3;
  float* const places[] = {nullptr, apart.data(), x.data(), residual.data()};
  float* const sum = places[variant / 2 % 4];
  std::vector<float> total(x.data(), x.data() + rows * n), kept(out.data(), out.data() + rows * n);
  if (added) for (int64_t i = 0; i < rows * n; ++i) total[(size_t)i] += residual[i];
  std::vector<float> sum_before;
  if (sum) sum_before.assign(sum, sum + rows * n);
  const float eps = variant % 4 ? 1e-5f : 1e-12f;
  t.rms_norm({x.data(), added ? residual.data() : nullptr, n, weight.data(), eps, sum, out.data()}, begin, end);
  const std::string what = shape(t, "rms_norm", rows, n, 0, variant);
  const bool fenced = x.fenced() && residual.fenced() && apart.fenced() && out.fenced() && weight.fenced();
  expect(fenced, what + " writes outside");
  for (int64_t r = 0; r < rows; ++r) {
    const float* v = total.data() + r * n;
    if (r < begin || r >= end) {
      expect(same(out.data() + r * n, kept.data() + r * n, n), what + " writes other rows");
      if (sum) expect(same(sum + r * n, sum_before.data() + r * n, n), what + " sums other rows");
      continue;
    }
    double squares = 0;
    for (int64_t i = 0; i < n; ++i) squares += (double)v[i] * v[i] / (double)n;
    for (int64_t i = 0; i < n; ++i) {
      if (sum && !std::isnan(v[i])) expect(sum[r * n + i] == v[i], what + " sum");
      const double want = v[i] * (1 / std::sqrt(squares + eps)) * weight[i];
      const float got = out[r * n + i];
      const double allowed = 1e-6 * std::fabs(want) * std::fmax(1, std::sqrt((double)n) / 8) + 1e-30;
      if (std::isnan(want)) expect(std::isnan(got), what + " NaN");
      else expect(std::fabs(got - want) <= allowed, what);
    }
  }
}

void test_rotate(const KernelTable& t, int64_t heads, int64_t depth) {
  const int64_t half = depth / 2;
  Buffer<float> x(heads * depth, 64), cosine(depth), sine(depth);
  for (int64_t i = 0; i < heads * depth; ++i) x[i] = normal();
  // The two halves have angles of their own.
  for (int64_t i = 0; i < depth; ++i) cosine[i] = normal(), sine[i] = normal();
  if (depth % 6 == 0) x[pick(0, heads * depth - 1)] = INFINITY;
  std::vector<float> want((size_t)(heads * depth));
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[h * depth + i], b = x[h * depth + half + i];
      const float ac = a * cosine[i], bs = b * sine[i], bc = b * cosine[half + i], as = a * sine[half + i];
      want[(size_t)(h * depth + i)] = ac - bs;
      want[(size_t)(h * depth + half + i)] = bc + as;
    }
  }
  t.rotate(x.data(), heads, depth, cosine.data(), sine.data());
  const std::string what = shape(t, "rotate", heads, depth, 0, 0);
  expect(x.fenced(), what + " writes outside");
  expect(same(x.data(), want.data(), heads * depth), what);
}

void test_products_and_sums(const KernelTable& t, int64_t count) {
  Buffer<float> a(count, 64), b(count, 64), out(count, 64);
  std::vector<float> products, sums;
  for (int64_t i = 0; i < count; ++i) {
    a[i] = normal() * std::ldexp(1.f, (int)pick(-70, 70));
    b[i] = normal() * std::ldexp(1.f, (int)pick(-70, 70));
    products.push_back(a[i] * b[i]);
    sums.push_back(a[i] + b[i]);
  }
  const std::string what = shape(t, "multiply and add", count, 0, 0, 0);
  t.add(a.data(), b.data(), out.data(), count);
  expect(out.fenced() && same(out.data(), sums.data(), count), what);
  t.multiply(a.data(), b.data(), count);
  expect(a.fenced() && b.fenced() && same(a.data(), products.data(), count), what + " in place");
}

void test_conversions(const KernelTable& t, int64_t count) {
  for (const DType dtype : {kFloat32, kBFloat16, kFloat16}) {
    Input x(dtype, 1, count, 0);
    Buffer<float> wide(count, 64);
    Output back(dtype, count);
    t.widen(x.data(), dtype, wide.data(), count);
    t.narrow(wide.data(), back.data(), dtype, count);
    const std::string what = shape(t, "conversions", count, dtype, 0, 0);
    expect(wide.fenced() && back.fenced(), what + " write outside");
    for (int64_t i = 0; i < count; ++i) expect(wide[i] == x.at(0, i) && back.at(i) == x.at(0, i), what);
  }
  // Between two numbers of bfloat16 the nearer one is taken, half-way the even one.
  Buffer<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = i % 3 ? normal() : from_bf16(to_bf16(normal())) * (1.f + 1.f / 256);
  Output out(kBFloat16, count);
  t.narrow(values.data(), out.data(), kBFloat16, count);
  for (int64_t i = 0; i < count; ++i) {
    expect(out.u16[i] == to_bf16(values[i]), shape(t, "rounding to bfloat16", count, i, 0, 0));
  }
}

// Values on edges of bins, within them, beside zero; for odd variants some that have no bin and go to the outermost.
void test_count_values(const KernelTable& t, int64_t count, int64_t bins, int exponent, int variant) {
  Buffer<float> x(count);
  Buffer<uint32_t> tables(4 * bins, 64);
  std::vector<uint64_t> want((size_t)bins, 0);
  const int64_t half = bins / 2, most = variant % 2 ? bins : half - 1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t edge = pick(-most, most);
    const double tiny = std::ldexp((double)pick(-3, 3), -149);
    const double number = pick(0, 2) ? (double)edge : (double)edge * std::fabs(std::sin((double)i));
    x[i] = pick(0, 5) == 0 ? (float)tiny : pick(0, 5) == 0 ? -0.f : (float)std::ldexp(number, exponent);
    const int64_t bin = (int64_t)std::ceil(std::ldexp((double)x[i], -exponent)) + half - 1;
    want[(size_t)(bin < 0 ? 0 : bin < bins ? bin : bins - 1)] += 1;
  }
  // Counts are added to what is there.
  for (int64_t i = 0; i < 4 * bins; ++i) tables[i] = (uint32_t)(i % 3);
  t.count_values(x.data(), count, std::ldexp(1.f, -exponent), bins, tables.data());
  const std::string what = shape(t, "count_values", count, bins, exponent, variant);
  expect(tables.fenced(), what + " writes outside");
  for (int64_t i = 0; i < bins; ++i) {
    uint64_t got = 0;
    for (int64_t j = 0; j < 4; ++j) got += tables[j * bins + i] - (uint64_t)((j * bins + i) % 3);
    expect(got == want[(size_t)i], what);
  }
}

void test_decoder_kernels(const KernelTable& t) {
  for (const int64_t n : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 576, 1000}) {
    for (int i = 0; i < 24; ++i) test_rms_norm(t, n, i);
  }
  for (const int64_t depth : {2, 4, 6, 14, 16, 18, 20, 30, 32, 34, 62, 64, 66, 128, 130}) {
    for (const int64_t heads : {1, 2, 3, 9}) test_rotate(t, heads, depth);
  }
  for (const int64_t count : {0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 1000}) {
    test_products_and_sums(t, count);
    test_conversions(t, count);
  }
  int variant = 0;
  for (const int64_t count : {0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 100, 2000}) {
    for (const int64_t bins : {2, 4, 512, 8192}) {
      for (const int exponent : {0, -1, -5, -30, -126}) test_count_values(t, count, bins, exponent, variant++);
    }
  }
}
