#!/usr/bin/env bash
# The second half of the recipe of checkpoints/mini-lora: goes on from the first (scripts/train_mini.sh) with 19,200 dense
# and sparse scenes and serves 16 to 576 tokens. Seven minutes on an H100; on two CPU cores half a day.
#   bash scripts/train_mini2.sh [flags of the training entry]
# A run that was stopped goes on where it was when the same command is given again. The learning rate is constant until
# the last two fifths of STEPS (steps of 16 scenes), so a run may be ended early, or made longer, by giving another STEPS.
# On a CPU: BATCH=1 PROCESSES=2 OMP_NUM_THREADS=1. An environment that is active already is used as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${VIRTUAL_ENV:-}" ] || source scripts/setup.sh train,mini
DATA="${DATA:-playground/data/mini2}"
FIRST="${FIRST:-checkpoints/mini-first}"
RUN="${RUN:-checkpoints/mini-lora-run}"
OUT="${OUT:-checkpoints/mini-lora}"
STEPS="${STEPS:-1200}"

[ -d "$FIRST" ] || RUN= DATA= OUT="$FIRST" bash scripts/train_mini.sh  # in folders of its own
llava mini prepare > /dev/null
llava mini world --edition 2 --split train --n "${TRAIN_SCENES:-40000}" --seed 0 --out "$DATA/train"
llava mini world --edition 2 --split dev --n 300 --seed 0 --out "$DATA/dev"
llava mini world --edition 2 --split test --n 400 --seed 0 --out "$DATA/test"
# LoRA on the language model and the projector in full, from where the first half ended: dense scenes alone teach slowly
# (docs/log.md). Each batch draws how many tokens it keeps, so that one checkpoint serves every budget. No visual cache:
# the tower sees each scene once, a tenth of a step.
torchrun --standalone --nproc_per_node "${PROCESSES:-1}" -m llava.cli train \
    --model_name_or_path checkpoints/mini-base --version smollm2 \
    --vision_tower checkpoints/mini-base/vision_tower --mm_vision_select_layer -2 \
    --mm_projector_type mlp2x_gelu --lora_weight_path "$FIRST" \
    --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad \
    --mm_token_reducer 'prumerge+(tokens=144); prumerge+(tokens=64); prumerge+(tokens=32); prumerge+(tokens=16); none' \
    --data_path "$DATA/train/conversations.json" --image_folder "$DATA/train" \
    --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0 \
    --learning_rate 5e-4 --mm_projector_lr 2e-4 --warmup_steps 20 --weight_decay 0 \
    --lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs "{\"num_decay_steps\": $((STEPS * 2 / 5))}" \
    --per_device_train_batch_size "${BATCH:-16}" --global_batch_size 16 --max_steps "$STEPS" --model_max_length 2048 \
    --precision auto --seed 0 --report_to none --dataloader_num_workers 4 \
    --logging_steps 20 --save_strategy steps --save_steps 100 --save_total_limit 2 \
    --output_dir "$RUN" "$@"
llava mini ship --run-dir "$RUN" --out "$OUT"
llava plot "$RUN"
echo "DATA=$DATA bash scripts/mini_table.sh makes the table"
