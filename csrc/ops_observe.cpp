// count_values: the histogram of a tensor, for observers.
#include <cmath>
#include <mutex>

#include "operands.h"

namespace mono_quant {
namespace {

constexpr int64_t kTables = 4;
// Values that one thread counts before its 32-bit counts are added up.
constexpr int64_t kCountAtOnce = 1 << 30;

// Scaling down could lose the smallest values in float32.
void count_wide(const float* x, int64_t count, double inverse, int64_t bins, uint32_t* table) {
  for (int64_t i = 0; i < count; ++i) {
    const double number = std::ceil((double)x[i] * inverse) + (double)(bins / 2 - 1);
    ++table[number > 0 ? smaller((int64_t)number, bins - 1) : 0];
  }
}

// ---- count_values(Tensor x, int bins, int exponent) -> Tensor

void count_values(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]);
  const int64_t bins = take_int(stack[1]), exponent = take_int(stack[2]);
  check(x.dtype() == aoti_torch_dtype_float32(), "count_values takes float32");
  check(bins >= 2 && bins <= 65536, "count_values takes 2 to 65536 bins");
  x.make_contiguous();
  Tensor out = Tensor::empty({bins}, aoti_torch_dtype_int64());
  int64_t* total = out.mutable_data<int64_t>();
  for (int64_t i = 0; i < bins; ++i) total[i] = 0;
  const KernelTable& table = kernels();
  const float* from = x.data<float>();
  const int64_t count = x.numel(), parts = worthwhile_threads((double)count / 500);
  const int64_t share = (count + parts - 1) / parts;
  std::mutex adding;
  run_tasks(parts, [&](int64_t part) {
    const int64_t end = smaller(count, (part + 1) * share);
    const ThreadScratch scratch(kTables * bins * 4);
    uint32_t* tables = static_cast<uint32_t*>(scratch.get());
    for (int64_t begin = part * share; begin < end; begin += kCountAtOnce) {
      const int64_t now = smaller(kCountAtOnce, end - begin);
      memset(tables, 0, (size_t)(kTables * bins * 4));
      if (exponent > 0) count_wide(from + begin, now, std::ldexp(1.0, -(int)exponent), bins, tables);
      else table.count_values(from + begin, now, std::ldexp(1.f, -(int)exponent), bins, tables);
      const std::lock_guard<std::mutex> lock(adding);
      for (int64_t i = 0; i < kTables * bins; ++i) total[i % bins] += tables[i];
    }
  });
  stack[0] = out.release();
}

}  // namespace
}  // namespace mono_quant

STABLE_TORCH_LIBRARY_IMPL(mono_quant, CPU, m) { m.impl("count_values", &mono_quant::count_values); }
