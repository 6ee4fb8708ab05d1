#!/usr/bin/env bash
# Sets everything up, then runs the linters, the type checker and the tests.
#   bash scripts/test.sh [options of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh train,quant,eval,mini,video,endpoint,demo,dev
# The web demo is tested in a real browser; elsewhere than in CI those tests say what is missing and are skipped.
if [ "${CI:-}" = true ] && ! command -v chromium > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } > /dev/null ||
        echo "chromium could not be installed: the browser tests of the demo are skipped" >&2
fi
llava mini prepare > /dev/null
export OMP_NUM_THREADS=1
ruff check .
ruff format --check .
lint-imports --no-cache --no-logo
mypy
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
