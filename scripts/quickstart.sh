#!/usr/bin/env bash
# Sets everything up, then asks a real small LLaVA about real photographs, with every visual token and with few.
#   bash scripts/quickstart.sh [options of `llava mini demo`]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh mini
llava mini prepare > /dev/null
exec llava mini demo "$@"
