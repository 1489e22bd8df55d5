#!/bin/sh
# Build the kernels and the C library under AddressSanitizer and UBSan and run their tests.
# Usage: sh native/sanitize.sh path/to/python   (needs g++ with libasan; Linux)
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
out=build/asan
mkdir -p "$out"
rm -rf "$out/src" "$out/native" && cp -r src "$out/src" && cp -r native "$out/native"
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
nanobind=$("$python" -c 'import nanobind, os; print(os.path.dirname(nanobind.__file__))')
flags="-std=c++17 -O1 -g -fPIC -fvisibility=hidden -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
for source in native/*.cpp; do
  name=$(basename "$source" .cpp)
  # The binding layer is compiled without instrumentation: what is under test is our code.
  [ -f "$out/nanobind.o" ] || g++ -std=c++17 -O1 -fPIC -fvisibility=hidden -DNDEBUG \
    -I"$nanobind/include" -I"$nanobind/ext/robin_map/include" -I"$include" \
    -c "$nanobind/src/nb_combined.cpp" -o "$out/nanobind.o"
  # shellcheck disable=SC2086 # flags are words
  g++ $flags -shared -I"$nanobind/include" -I"$nanobind/ext/robin_map/include" -I"$include" \
    "$source" "$out/nanobind.o" -o "$out/src/gossamer/_native/$name$suffix"
done
# The editable install's import hook would win over the path: drop it.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
GOSSAMER_C_FLAGS="-O1 -g -DGOSSAMER_PORTABLE -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 "$python" - <<'PY'
import sys

sys.meta_path = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
sys.path.insert(0, "build/asan/src")
import gossamer
import pytest

assert "build/asan" in gossamer.__file__, gossamer.__file__
tests = [f"pack/test_{t}" for t in ("bits", "huffman", "ans", "gaps", "context", "pack", "pack_hostile")]
tests += ["quantize/test_kmeans", "distribute/test_exchange_codecs"]
tests += [f"runtime/kernels/test_{t}" for t in ("conv", "gemv", "row_books")]
tests += ["runtime/plan/test_small", "runtime/test_c", "native/test_kernels"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *[f"tests/{t}.py" for t in tests]]))
PY
