#!/usr/bin/env bash
# tools/asan.sh [python [--no-harness]]: the kernel tests under gcc's address sanitizer, and the
# harness (which pytest runs too) under that of undefined behaviour as well, whose checks make the
# unrolled tiles slow to compile. The package is built aside, in build/asan.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
cc=${CC:-gcc}

export QUANTIZATION_CFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address"
"$python" setup.py -q build --build-base build/asan --build-lib build/asan/lib

# The interpreter is not sanitized, so the runtime comes first by LD_PRELOAD, and what throws
# exceptions with it: torch loads that too late for the runtime to see. CPython keeps memory
# at exit, so leaks are not asked for; -P keeps this folder's own package off the path.
run() {
    env LD_PRELOAD="$("$cc" -print-file-name=libasan.so) $("$cc" -print-file-name=libstdc++.so)" \
        PYTHONMALLOC=malloc \
        ASAN_OPTIONS=detect_leaks=0 \
        PYTHONPATH="$PWD/build/asan/lib" "$python" -P "$@"
}
run -c '
import quantization._kernels as kernels
assert "build/asan" in kernels.__file__, f"the sanitized build was not found: {kernels.__file__}"
'
# The reference kernels are under both sanitizers in the harness. The tests import each other from
# this folder, which comes last on the path, behind the sanitized build.
run -m pytest -q -p no:cacheprovider --import-mode=append tests/kernels -k "not reference"
[ "${2:-}" = --no-harness ] || "$python" tests/emulated/targets.py native-sanitized
