#include "isa.h"

#include <string.h>

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mono_quant {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned sub) {
  Registers r;
  if (!__get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d)) return Registers();
  return r;
}

// What the operating system saves on a context switch; a feature the processor has but the system does not save is
// not usable.
unsigned long long saved_state() {
  if (!(cpuid(1, 0).c >> 27 & 1)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (unsigned long long)high << 32 | low;
}

bool has_avx2() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  const bool fma = one.c >> 12 & 1, f16c = one.c >> 29 & 1, avx = one.c >> 28 & 1, avx2 = seven.b >> 5 & 1;
  return fma && f16c && avx && avx2 && (saved_state() & 0x6) == 0x6;
}

bool has_avxvnni() { return has_avx2() && (cpuid(7, 1).a >> 4 & 1); }

bool has_avx512vnni() {
  const Registers seven = cpuid(7, 0);
  const bool f = seven.b >> 16 & 1, dq = seven.b >> 17 & 1, bw = seven.b >> 30 & 1, vl = seven.b >> 31 & 1;
  const bool vnni = seven.c >> 11 & 1;
  return has_avx2() && f && dq && bw && vl && vnni && (saved_state() & 0xe6) == 0xe6;
}

bool has_avx512bf16() { return has_avx512vnni() && (cpuid(7, 1).a >> 5 & 1); }

bool has_amx() {
  const Registers seven = cpuid(7, 0);
  const bool tile = seven.d >> 24 & 1, int8 = seven.d >> 25 & 1, bf16 = seven.d >> 22 & 1;
  if (!has_avx512vnni() || !tile || !int8 || !bf16 || (saved_state() & 0x60000) != 0x60000) return false;
#if defined(__linux__)
  // Tile registers are saved only for processes that ask: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

#endif

#if defined(__x86_64__)

KernelTable with_float_linear(KernelTable table, const char* name, const FloatLinearKernels& kernels) {
  table.name = name;
  table.float_linear_scratch_bytes = kernels.scratch_bytes;
  table.float_linear = kernels.run;
  return table;
}

#endif

struct Available {
  const KernelTable* tables[6];
  int count = 0;
  char names[64];

  Available() {
#if defined(__x86_64__)
    if (has_amx()) tables[count++] = &kAmxKernels;
    static const KernelTable bf16 = with_float_linear(kAvx512VnniKernels, "avx512bf16", kAvx512Bf16FloatLinear);
    if (has_avx512bf16()) tables[count++] = &bf16;
    if (has_avx512vnni()) tables[count++] = &kAvx512VnniKernels;
    if (has_avxvnni()) tables[count++] = &kAvxVnniKernels;
    if (has_avx2()) tables[count++] = &kAvx2Kernels;
#endif
    tables[count++] = &kGenericKernels;
    names[0] = 0;
    for (int i = 0; i < count; ++i) {
      if (i) strcat(names, ",");
      strcat(names, tables[i]->name);
    }
  }
};

const Available& available() {
  static const Available found;
  return found;
}

std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> table{available().tables[0]};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace mono_quant

extern "C" {

const char* mono_quant_version() { return MONO_QUANT_VERSION; }

const char* mono_quant_isa() { return mono_quant::kernels().name; }

const char* mono_quant_available_isas() { return mono_quant::available().names; }

int mono_quant_set_isa(const char* name) {
  const mono_quant::Available& found = mono_quant::available();
  for (int i = 0; i < found.count; ++i) {
    if (strcmp(found.tables[i]->name, name) == 0) {
      mono_quant::chosen().store(found.tables[i], std::memory_order_relaxed);
      return 0;
    }
  }
  return 1;
}

}
