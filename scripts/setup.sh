# Sourced by quickstart.sh and test.sh: a .venv beside the code with the wanted extras in it.
#   source scripts/setup.sh EXTRAS        e.g. mini or train,eval,mini,dev
# Installs only when pyproject.toml, the constraints or the extras changed, so the second time is quick and needs
# no network. CONSTRAINTS= (empty) takes the newest versions pyproject.toml admits, another file's path those of it.
extras="$1"
constraints="${CONSTRAINTS-scripts/constraints.txt}"
stamp=".venv/.installed-${extras//,/-}"
python="${PYTHON:-python3}"
if [ ! -x .venv/bin/python ]; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "Python 3.11 or newer is needed; $python is $("$python" -V 2>&1). PYTHON=/path/to/python3.11 bash $0" >&2
        exit 2
    fi
    "$python" -m venv .venv
fi
wanted="$(cat pyproject.toml ${constraints:+"$constraints"} | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing .[$extras] into .venv (a few minutes the first time)" >&2
    # A torch that satisfies pyproject.toml is left alone: install the build your GPU needs first, if any.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        ${constraints:+--constraint "$constraints"} -e ".[$extras]"
    echo "$wanted" > "$stamp"
fi
# shellcheck disable=SC1091
source .venv/bin/activate
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
