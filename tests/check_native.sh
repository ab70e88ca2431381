#!/usr/bin/env bash
# The native kernels under the address and undefined-behaviour sanitizers, for every instruction set: AVX-512 is
# computed with AVX2 and AMX number by number, so that they are tested on processors without them too. Needs cmake, ninja, GCC and AVX2.
#
#     tests/check_native.sh PYTHON     a Python with the package's test requirements
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: tests/check_native.sh PYTHON}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake -S kernels -B "$work" -G Ninja -DCMAKE_BUILD_TYPE=Release -DHF_GPTQ_SANITIZE=ON -DHF_GPTQ_EMULATE_AVX512=ON >"$work/log"
cmake --build "$work" --parallel "$(nproc)" >>"$work/log" || { tail -40 "$work/log"; exit 1; }
export HF_GPTQ_LIBRARY="$work/libhf_gptq.so"
# Python itself leaks, and Torch's libraries define some symbols more than once.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
run() {
  echo "-- $1"
  HF_GPTQ_ISA=$1 LD_PRELOAD=$preload "$python" -c '
import sys
from hf_gptq_plugin import native
status = native.status()
sys.exit(0 if status.isa == sys.argv[1] else f"asked for {sys.argv[1]}: {status}")' "$1"
  HF_GPTQ_ISA=$1 LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider "${@:2}"
}
run avx512bf16 tests/nn/test_pairs.py
run avx512bf16 tests/nn/test_ops.py -k "not pytorch"
run amx tests/nn/test_tiles.py
# The others have no order of operations of their own: what reads and writes memory.
memory="not pytorch and not against_float64 or test_transposed_against_float64 and native"
for isa in amx avx512f avx2 portable; do
  run "$isa" tests/nn/test_ops.py -k "$memory"
done
run avx2 tests/nn/test_fixed.py
run avx512bf16 tests/nn/test_int8.py
run avx512f tests/nn/test_int8.py
run avx2 tests/solve/test_linalg.py
for isa in avx512f avx2 portable; do
  run "$isa" tests/solve/test_joint.py -k "native"
done
