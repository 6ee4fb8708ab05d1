#!/usr/bin/env bash
# What touches transformers' own classes, with the oldest transformers that pyproject.toml admits.
#   bash scripts/test_oldest.sh [options of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh train,quant,eval,mini,video,dev
oldest=.venv/oldest
if [ ! -d "$oldest/transformers" ]; then
    python -m pip install --quiet --disable-pip-version-check --target "$oldest" --no-deps \
        transformers==5.17.0 "huggingface_hub<2" httpx httpcore h11
fi
export OMP_NUM_THREADS=1 PYTHONPATH="$oldest"
exec python -m pytest -n 2 --dist loadfile tests/test_plug.py tests/test_plug_train.py tests/test_vision_tower.py \
    tests/test_reducer_scores.py tests/test_llava_llama.py tests/test_prefix.py "$@"
