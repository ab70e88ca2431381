#!/usr/bin/env bash
# The native kernels under the address and undefined-behaviour sanitizers, for every instruction set: AVX-512 is
# computed with AVX2, so that it is tested on processors without it too. Needs cmake, a C++ compiler (GCC) and AVX2.
#
#     tests/check_native.sh PYTHON     a Python with the package's test requirements
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: tests/check_native.sh PYTHON}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake -S kernels -B "$work" -DCMAKE_BUILD_TYPE=Release -DHF_GPTQ_SANITIZE=ON -DHF_GPTQ_EMULATE_AVX512=ON >"$work/log"
cmake --build "$work" --parallel "$(nproc)" >>"$work/log" || { tail -40 "$work/log"; exit 1; }
export HF_GPTQ_LIBRARY="$work/libhf_gptq.so"
# Python itself leaks, and Torch's libraries define some symbols more than once.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
for isa in avx512bf16 avx512f avx2 portable; do
  echo "-- $isa"
  HF_GPTQ_ISA=$isa LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider tests/nn/test_ops.py tests/nn/test_pairs.py -k "not pytorch"
done
echo "-- the solver"
LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider tests/solve/test_linalg.py tests/solve/test_refine.py
