#!/usr/bin/env bash
# Installing sinq puts code into every start of Python in that environment.
#
# The wheel has a sitecustomize.py at its top, which Python imports at each start, whatever is
# run. It patches transformers before anybody asks (SINQ_AUTO_PATCH=0 turns that off), so the
# times and classes of other libraries measured in the same environment are not their own; where a
# package that it needs is missing, each start writes to stderr, and a sitecustomize.py of the
# user's own is replaced or hidden.
#
# Seen on 2026-11-30 with sinq 0.2.0. Fails if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps sinq==0.2.0
cd "$place"
told=$("$place/venv/bin/python" -c '
import sys
print("sitecustomize" in sys.modules, sys.modules["sitecustomize"].__file__.endswith("site-packages/sitecustomize.py"))
' 2>stderr)
echo "a program that imports nothing: sitecustomize was run: $told; stderr: $(cat stderr)"
[ "$told" = "True True" ]
grep -q "SINQ" stderr
