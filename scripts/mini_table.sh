#!/usr/bin/env bash
# The tables of docs/mini.md: every reducer at every number of tokens on composed scenes (BED=outputs/mini-table gets
# table.md and a plot), then the small model on its six benchmarks.
#   bash scripts/mini_table.sh [flags of `llava eval`]
# About 6 hours on one core and 20 minutes on two. A run that was stopped goes on where it was when the same command
# is given again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${VIRTUAL_ENV:-}" ] || source scripts/setup.sh mini,eval
DATA="${DATA:-playground/data/mini2}"
llava mini world --edition 2 --split test --n 300 --seed 0 --out "$DATA/test" > /dev/null
llava mini evaluate --model-path "${MODEL:-checkpoints/mini-lora}" --data "$DATA/test" --out "${BED:-outputs/mini-table}"

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
