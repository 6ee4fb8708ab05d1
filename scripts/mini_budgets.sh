#!/usr/bin/env bash
# Does one checkpoint serve every budget? The second half of the small model's recipe three times at equal cost: trained
# on varied numbers of visual tokens, on 144 only, on 32 only, each from the first half's model on (which knows 144).
# Each is asked at 16, 32, 64, 144 and 576 tokens of PruMerge+.
#   bash scripts/mini_budgets.sh [flags of the training entry]     on a CPU: BATCH=1 PROCESSES=2 OMP_NUM_THREADS=1
# Some two hours of training each on two cores (two minutes each on an H100, the three beside one another), then SCENES
# (310) of the test split: two and a half hours of a core. Writes DIR/table.md and DIR/accuracy.png. A run that was
# stopped goes on where it was when the same command is given again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${VIRTUAL_ENV:-}" ] || source scripts/setup.sh train,mini
export DATA="${DATA:-playground/data/mini2}"
DIR="${DIR:-outputs/mini-budgets}"
# A scene costs 10 ms a position: visual tokens (167 in the mean, 145 or 33), 220 of text, and the tower as much as 60. So
# for the price of 190 varied steps there are 200 at 144 tokens and 271 at 32.
train() {
    RUN="$DIR/$1-run" OUT="$DIR/$1" STEPS=$2 bash scripts/train_mini2.sh "${@:3}"
}
train varied 190 "$@"
train 144 200 --mm_token_reducer 'prumerge+(tokens=144)' "$@"
train 32 271 --mm_token_reducer 'prumerge+(tokens=32)' "$@"
for trained in 32 144 varied; do
    llava mini evaluate --model-path "$DIR/$trained" --data "$DATA/test" --scenes "${SCENES:-310}" \
        --reducers prumerge+ --tokens 16 32 64 144 --out "$DIR/bed-$trained" > /dev/null
done
python scripts/mini_budgets.py "$DATA/test" "$DIR" 32 144 varied
