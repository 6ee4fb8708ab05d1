# Shared by the evaluation scripts beside it (sourced, not run): settings, and the two commands they are made of.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../settings.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

setting PYTHON python python "the Python to run"
setting MODEL liuhaotian/llava-v1.5-7b checkpoints/mini-lora "checkpoint: folder or hub name"
setting BASE "" checkpoints/mini-base "base of a LoRA checkpoint"
setting REDUCER "" "" "visual token reducer: none, prumerge, prumerge+, topk(tokens=64) ...; empty: the checkpoint's"
setting CONV "" "" "prompt template; empty: vicuna_v1, for the small model smollm2"
setting PROTOCOL "" "" "way of asking; textvqa: ocr, no-ocr; scienceqa: pad, crop; empty: the first"
setting ROOT playground/data/eval playground/data/eval-mini "folder of the benchmarks' files"
setting RUN "$(basename "$MODEL")${REDUCER:+-$REDUCER}${PROTOCOL:+-$PROTOCOL}" \
    "$(basename "$MODEL")${REDUCER:+-$REDUCER}${PROTOCOL:+-$PROTOCOL}" "name of the answers file"
setting DRY_RUN "" "" "1: print the commands and stop"

help_and_exit() {
    usage "1: the small model on small sets of composed scenes, on any machine" \
        "One process per visible GPU shares the work. Arguments are flags of \`llava eval\`: $0 --limit 100"
    exit 0
}

run() {
    printf '%q ' "$@" >&2
    echo >&2
    [[ -n $DRY_RUN ]] || "$@"
}

# evaluate BENCHMARK FOLDER "$@": ask the questions, write the answers to ROOT/FOLDER/answers/RUN.jsonl, score them.
evaluate() {
    local benchmark=$1 folder=$2
    shift 2
    ! asks_for_help "$@" || help_and_exit
    [[ -z $MINI || -n $DRY_RUN ]] || prepare_mini
    ANSWERS=$ROOT/$folder/answers/$RUN.jsonl
    UPLOAD=$ROOT/$folder/answers_upload/$RUN
    local model=(--model-path "$MODEL")
    [[ -z $BASE ]] || model+=(--model-base "$BASE")
    [[ -z $REDUCER ]] || model+=(--reducer "$REDUCER")
    [[ -z $CONV ]] || model+=(--conv-mode "$CONV")
    [[ -z $PROTOCOL ]] || model+=(--protocol "$PROTOCOL")
    run "$PYTHON" -m llava.cli eval "$benchmark" "${model[@]}" --root "$ROOT" --answers "$ANSWERS" "$@"
}

# submit BENCHMARK SUFFIX "$@": write what the benchmark's server takes. Not after flags that ask only a part.
submit() {
    local benchmark=$1 suffix=$2 flag
    shift 2
    for flag in "$@"; do
        case $flag in --limit* | --num-chunks* | --chunk-idx* | --questions* | --answers*) return 0 ;; esac
    done
    run "$PYTHON" -m llava.cli submit "$benchmark" --root "$ROOT" --answers "$ANSWERS" --out "$UPLOAD.$suffix"
}

# The small model and its sets, made here where they are not there yet.
prepare_mini() {
    [[ -e checkpoints/mini-base ]] || "$PYTHON" -m llava.cli mini prepare
    [[ -e $ROOT/mini.json ]] || "$PYTHON" -m llava.cli mini benchmarks --out "$ROOT"
}
