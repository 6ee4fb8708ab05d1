#!/usr/bin/env bash
# Sets everything up, then runs the linters, the type checker and the tests.
#   bash scripts/test.sh [options of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh train,quant,eval,mini,video,dev
llava mini prepare > /dev/null
export OMP_NUM_THREADS=1
ruff check .
ruff format --check .
lint-imports --no-cache --no-logo
mypy
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
