// AVX2 kernels with the 256-bit dot product of AVX-VNNI: processors for clients since 2021, and servers without
// AVX-512.
//
// Everything but the integer products is the AVX2 unit's. Bound for many rows: the rate of vpdpbusd, 32 products each.
// Measured as in kernels_avx512vnni.cpp on one Zen 5 core: 245 to 260 of the 271 products per nanosecond that the
// instruction allows, 4.2 to 4.5 times torch's float32, one row 3.1 to 16 times.
#define MONO_QUANT_AVX_VNNI
#include "kernels_avx2.cpp"
