// Which instruction sets this processor and this build offer, and which one is in use.
#pragma once

#include "kernels.h"

namespace mono_quant {

// The table in use. Chosen once, the best available; set_isa changes it for tests.
const KernelTable& kernels();

}  // namespace mono_quant

extern "C" {

#define MONO_QUANT_EXPORT __attribute__((visibility("default")))

// The library's version, to be compared with the Python package's.
MONO_QUANT_EXPORT const char* mono_quant_version();
// Name of the instruction set in use.
MONO_QUANT_EXPORT const char* mono_quant_isa();
// Comma-separated names this processor can run, best first.
MONO_QUANT_EXPORT const char* mono_quant_available_isas();
// 0 when `name` is in use from now on, 1 when it is unknown or unavailable here.
MONO_QUANT_EXPORT int mono_quant_set_isa(const char* name);
// Forget the layers that the operators hold_decoder_layers and hold_encoder_layers have answered this number for; one that
// is not there is no error.
MONO_QUANT_EXPORT void mono_quant_release_decoder_layers(int64_t number);
MONO_QUANT_EXPORT void mono_quant_release_encoder_layers(int64_t number);

}
