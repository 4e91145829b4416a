#!/bin/bash
# All stages of gpu_check.py on a machine with a GPU, about eight minutes; .whl/ may hold wheels of
# packages that it lacks. The table comes last.
set -u
cd "$(dirname "$0")/.."
site=$(mktemp -d)
if [ -d .whl ]; then python3 -m pip install -q --no-index --no-deps --target "$site" .whl/*.whl; fi
export PYTHONUNBUFFERED=1 PYTHONPATH="$site:src${PYTHONPATH:+:$PYTHONPATH}"
exec python3 benchmarks/gpu_check.py --output "${OUT:-gpu_check}" "$@"
