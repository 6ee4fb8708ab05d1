#!/usr/bin/env bash
# The tables of docs/mini.md: every reducer at every number of tokens on two worlds, composed scenes and easy-vqa
# (table.md and a plot in BED/scenes and BED/easy-vqa), then the small model on its six benchmarks.
#   bash scripts/mini_table.sh [flags of `llava eval`]
# DATA/test may hold another world; SCENES=N takes the first N pictures of each, and not the 310 composed scenes and 415
# pictures of easy-vqa that 4,000 questions are about. About 14 hours on two cores, one for each world (SCENES=40: two
# hours), then 40 minutes for the benchmarks. A run that was stopped goes on where it was when the same command
# is given again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${VIRTUAL_ENV:-}" ] || source scripts/setup.sh mini,eval
DATA="${DATA:-playground/data/mini2}"
bed() {
    OMP_NUM_THREADS=1 llava mini evaluate --model-path "${MODEL:-checkpoints/mini-lora}" --data "$1" \
        --scenes "${SCENES:-$3}" --out "${BED:-outputs/mini-table}/$2" > /dev/null
}
llava mini prepare > /dev/null
[ -e "$DATA/test/world.json" ] || llava mini world --edition 2 --split test --n 400 --seed 0 --out "$DATA/test" > /dev/null
python -m pip install --quiet --disable-pip-version-check --no-deps easy-vqa  # 3 MB of pictures and questions
llava mini easy-vqa --split test --out "$DATA/easy-vqa" > /dev/null
bed "$DATA/test" scenes 310 &
bed "$DATA/easy-vqa" easy-vqa 415
wait $!

export MINI=1 ROOT="${ROOT:-playground/data/eval-mini-table}"
[ -e "$ROOT/mini.json" ] || llava mini benchmarks --n "${PICTURES:-30}" --out "$ROOT" > /dev/null

ask() {
    REDUCER=$1 bash scripts/v1_5/eval/all.sh "${@:2}" > /dev/null
}
for reducer in none prumerge+ 'prumerge+(tokens=144)' prumerge; do
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
