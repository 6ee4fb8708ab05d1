#!/usr/bin/env bash
# Sets up .venv-vllm if needed, then tests the vLLM plug-in: prompts and processor, an engine in this process, a server.
#   bash scripts/test_vllm.sh [options of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_vllm.sh
# The small model is built by the main environment, which has the readers that takes.
if [ ! -d checkpoints/mini-base ]; then
    (source scripts/setup.sh mini && llava mini prepare > /dev/null)
fi
exec .venv-vllm/bin/python -m pytest tests_vllm "$@"
