#!/usr/bin/env bash
# Builds the wheel and the source distribution and tries both in an empty environment: the first
# command with the wheel, in another folder; then tests from the unpacked source distribution.
#   .github/check_packages.sh PYTHON DIST     (PYTHON has build and twine; DIST is a new folder)
set -euo pipefail
python=$1
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir "$2"
dist=$(cd "$2" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --outdir "$dist" "$root"
"$python" -m twine check --strict "$dist"/*

cd "$work"
"$python" -m venv fresh
fresh/bin/pip install --quiet -c "$root/constraints.txt" "$dist"/*.whl
fresh/bin/mixer train --epochs 1 --output run
fresh/bin/mixer predict run 'digits:test[:3]'

mkdir source
tar -xzf "$dist"/*.tar.gz -C source --strip-components 1
cd source
../fresh/bin/pip install --quiet -c "$root/constraints.txt" -e '.[test]'
../fresh/bin/pytest -q --collect-only | tail -n 1
../fresh/bin/pytest -q tests/models/test_mixer.py tests/test_names.py
