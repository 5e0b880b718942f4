// From the 16-column panels back to the row-major weight: no speed matters here.

namespace {

void unpack_weight(const int8_t* packed, int64_t n, int64_t k, int64_t panel_begin, int64_t panel_end,
                   int8_t* weight) {
  const int64_t kp = mono_quant::round_up(k, mono_quant::kPanelDepth);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int8_t* from = packed + panel * kp * 16;
    for (int64_t c = 0; c < 16 && panel * 16 + c < n; ++c) {
      int8_t* row = weight + (panel * 16 + c) * k;
      int64_t i = 0;
      for (; i + 4 <= k; i += 4) memcpy(row + i, from + (i / 4 * 16 + c) * 4, 4);
      for (; i < k; ++i) row[i] = from[(i / 4 * 16 + c) * 4 + i % 4];
    }
  }
}

}  // namespace
