// Dividing a scratch area.

namespace {

// The next 64-byte aligned piece of a scratch area; with a null base only the size is counted.
inline char* piece(char* base, int64_t* at, int64_t bytes) {
  char* p = base ? base + *at : nullptr;
  *at += mono_quant::round_up(bytes, 64);
  return p;
}

}  // namespace
