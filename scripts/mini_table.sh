#!/usr/bin/env bash
# The small model on its six benchmarks with every reducer, and one table of all: the one of docs/mini.md.
#   bash scripts/mini_table.sh [flags of `llava eval`]
# About 20 minutes on 2 cores. A run that was stopped goes on where it was when the same command is given again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh mini,eval
export MINI=1 ROOT="${ROOT:-playground/data/eval-mini-table}"
[ -e "$ROOT/mini.json" ] || llava mini benchmarks --n "${PICTURES:-30}" --out "$ROOT" > /dev/null

ask() {
    REDUCER=$1 bash scripts/v1_5/eval/all.sh "${@:2}" > /dev/null
}
for reducer in none prumerge+ 'prumerge+(max_tokens=144)' prumerge; do
    ask "$reducer" "$@"
done
# Random and top-k selection keep as many tokens as PruMerge did.
count=$(python -c '
import json, sys
print(round(json.load(open(sys.argv[1]))["summary"]["visual_tokens"]["mean"]))
' "$ROOT/pope/answers/mini-lora-prumerge.provenance.json")
ask "random(tokens=$count)" "$@"
ask "topk(tokens=$count)" "$@"
llava report "$ROOT" --html "$ROOT/report.html" --json "$ROOT/report.json"
