#!/bin/sh
# Builds the kernels and tests/csrc/driver.cpp without torch, under AddressSanitizer and UndefinedBehaviorSanitizer,
# and runs every kernel that this processor has, the AMX code on emulated tiles. Arguments replace these flags.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

compiler=${CXX:-c++}
sanitizers=${*:--O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all}
common="-std=c++17 -pthread -ffp-contract=off -I$root/csrc -DMONO_QUANT_VERSION=\"test\""
kernel="-fno-exceptions -fno-rtti -Wno-psabi"
avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"

compile() {
  output=$1
  shift
  # The flags are words of their own.
  # shellcheck disable=SC2086
  "$compiler" $common $sanitizers "$@" -c -o "$build/$output.o"
}

compile driver "$root/tests/csrc/driver.cpp" &
compile isa "$root/csrc/isa.cpp" &
wait
# shellcheck disable=SC2086
{
  compile generic $kernel "$root/csrc/kernels_generic.cpp"
  case $(uname -m) in
    x86_64 | amd64)
      compile avx2 $kernel $avx2 "$root/csrc/kernels_avx2.cpp"
      compile avxvnni $kernel $avx2 "$root/csrc/kernels_avxvnni.cpp"
      compile avx512vnni $kernel $avx512 "$root/csrc/kernels_avx512vnni.cpp"
      compile avx512bf16 $kernel $avx512 -mavx512bf16 "$root/csrc/kernels_avx512bf16.cpp"
      compile amx $kernel $avx512 -mamx-tile -mamx-int8 -mamx-bf16 "$root/csrc/kernels_amx.cpp"
      compile amx_emulated $kernel $avx512 -DMONO_QUANT_AMX_EMULATED "$root/csrc/kernels_amx.cpp"
      ;;
  esac
  "$compiler" -pthread $sanitizers "$build"/*.o -o "$build/driver"
}
"$build/driver"
