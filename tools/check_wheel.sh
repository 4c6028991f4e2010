#!/usr/bin/env bash
# tools/check_wheel.sh [python]: build sdist -> wheel, audit both, and try the one wheel on other
# Pythons with numpy alone. Needs the extra "dev" in that python.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
wheel=$(ls "$work"/dist/*.whl)
echo "built $(cd "$work/dist" && ls | tr '\n' ' ')"
case $wheel in
*-cp311-abi3-*) ;;
*) echo "expected one cp311-abi3 wheel"; exit 1 ;;
esac

"$python" -m twine check --strict "$work"/dist/*
"$python" -m abi3audit --strict --summary "$wheel"
if "$python" -c 'import sys; sys.exit(sys.platform != "linux")'; then
    "$python" -m auditwheel show "$wheel"
fi

"$python" -m zipfile -e "$wheel" "$work/unpacked"
extension=$(ls "$work"/unpacked/quantization/_kernels*.so)
exported=$(nm -D --defined-only "$extension" | awk '{print $NF}')
[ "$exported" = PyInit__kernels ] || { echo "exports more than its init: $exported"; exit 1; }
if readelf -d "$extension" | grep -E 'NEEDED.*(omp|torch|stdc\+\+)'; then
    echo "links a library that it must not"
    exit 1
fi
for file in py.typed _kernels.pyi; do
    [ -f "$work/unpacked/quantization/$file" ] || { echo "the wheel lacks $file"; exit 1; }
done

# An interpreter that really is python$1: pyenv's shims may not be.
find_python() {
    local candidate
    for candidate in "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
        if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

# The tests travel without the tree, so that only the installed wheel can be imported; those of the
# tree itself stay behind.
mkdir "$work/apart"
cp -r tests "$work/apart/tests"
(cd "$work/apart/tests" && rm -f test_house.py test_pages.py test_emulated.py)
for version in 3.12 3.13; do
    other=$(find_python "$version")
    if [ -z "$other" ]; then
        echo "python$version: skipped, not installed"
        continue
    fi
    "$other" -m venv "$work/$version"
    "$work/$version/bin/pip" install -q --disable-pip-version-check numpy pytest pytest-xdist hypothesis
    "$work/$version/bin/pip" install -q --disable-pip-version-check --no-deps "$wheel"
    echo "python$version, $("$work/$version/bin/python" -c 'import numpy; print("numpy", numpy.__version__)'), no torch:"
    (cd "$work/apart" && "$work/$version/bin/python" -m pytest -q tests -m "not deep" -p no:cacheprovider) || exit 1
done
