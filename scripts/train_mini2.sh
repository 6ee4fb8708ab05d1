#!/usr/bin/env bash
# The recipe of the small model's second edition, which is not shipped yet: it goes on from the first one
# (checkpoints/mini-lora, scripts/train_mini.sh) for many hours on a CPU, sees 12,000 scenes and serves 16 to 576 tokens.
#   bash scripts/train_mini2.sh [flags of the training entry, e.g. --use_cpu False]
# A run that was stopped goes on where it was when the same command is given again. The learning rate is constant
# until the last fifth of STEPS, so a run may be ended early, or made longer, by giving another STEPS (steps of 8
# scenes). PROCESSES=2 takes a step's scenes on two cores, each with OMP_NUM_THREADS=1: faster than two threads. An
# environment that is active already is used as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${VIRTUAL_ENV:-}" ] || source scripts/setup.sh train,mini
DATA="${DATA:-playground/data/mini2}"
RUN="${RUN:-checkpoints/mini2-run}"
FIRST="${FIRST:-checkpoints/mini-lora}"
OUT="${OUT:-checkpoints/mini2-lora}"
SCENES="${SCENES:-12000}"
STEPS="${STEPS:-1500}"

llava mini prepare > /dev/null
llava mini world --edition 2 --split train --n "$SCENES" --seed 0 --out "$DATA/train"
llava mini world --edition 2 --split dev --n 300 --seed 0 --out "$DATA/dev"
llava mini world --edition 2 --split test --n 300 --seed 0 --out "$DATA/test"
# LoRA on the language model and the projector in full, from where the first model ended: dense scenes alone teach
# slowly (docs/log.md). Each scene draws how many tokens it keeps, so that one checkpoint serves every budget. One scene
# at a time: the draws differ in length, and padding would cost as much as tokens. No visual cache: the tower sees each
# scene once an epoch, a tenth of a step.
torchrun --standalone --nproc_per_node "${PROCESSES:-1}" -m llava.cli train \
    --model_name_or_path checkpoints/mini-base --version smollm2 \
    --vision_tower checkpoints/mini-base/vision_tower --mm_vision_select_layer -2 \
    --mm_projector_type mlp2x_gelu --lora_weight_path "$FIRST" \
    --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad \
    --mm_token_reducer 'prumerge+(tokens=144); prumerge+(tokens=64); prumerge+(tokens=32); prumerge+(tokens=16); none' \
    --data_path "$DATA/train/conversations.json" --image_folder "$DATA/train" \
    --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0 \
    --learning_rate 4e-4 --mm_projector_lr 2e-4 --warmup_steps 20 --weight_decay 0 \
    --lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs "{\"num_decay_steps\": $((STEPS / 5))}" \
    --per_device_train_batch_size 1 --global_batch_size 8 --max_steps "$STEPS" --model_max_length 2048 \
    --precision auto --use_cpu True --seed 0 --report_to none \
    --logging_steps 5 --save_strategy steps --save_steps 25 --save_total_limit 2 \
    --output_dir "$RUN" "$@"
llava mini ship --run-dir "$RUN" --out "$OUT"
llava plot "$RUN"
echo "MODEL=$OUT DATA=$DATA bash scripts/mini_table.sh makes the table"
