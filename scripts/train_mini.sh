#!/usr/bin/env bash
# The first half of the small model's recipe, from nothing: about 50 minutes on 2 CPU cores of their own. The second
# half, scripts/train_mini2.sh, runs this one where its result is missing.
#   bash scripts/train_mini.sh [flags of the training entry, e.g. --max_steps 1000 --use_cpu False]
# A run that was stopped goes on where it was when the same command is given again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${VIRTUAL_ENV:-}" ] || source scripts/setup.sh train,mini
DATA="${DATA:-playground/data/mini}"
RUN="${RUN:-checkpoints/mini-first-run}"
OUT="${OUT:-checkpoints/mini-first}"
ALIGN="${ALIGN:-checkpoints/mini-align}"

llava mini prepare > /dev/null
llava mini world --split train --n 1680 --seed 0 --out "$DATA/train"
# Stage 1 in short: patches to words, without the language model.
[ -f "$ALIGN/mm_projector.bin" ] ||
    llava mini align --data "$DATA/train" --scenes 1000 --steps 1200 --batch 1024 --out "$ALIGN"
# Stage 2: one epoch of LoRA on the language model and the projector in full. PruMerge+ because its tokens show
# both the things and what lies between them, so that the model reads fewer and more; encoded once, then cached.
llava train \
    --model_name_or_path checkpoints/mini-base --version smollm2 \
    --vision_tower checkpoints/mini-base/vision_tower --mm_vision_select_layer -2 \
    --mm_projector_type mlp2x_gelu --pretrain_mm_mlp_adapter "$ALIGN/mm_projector.bin" \
    --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad \
    --mm_token_reducer 'prumerge+(max_tokens=144)' --visual_cache "$DATA/visual-cache" \
    --data_path "$DATA/train/conversations.json" --image_folder "$DATA/train" \
    --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0 \
    --learning_rate 5e-4 --mm_projector_lr 2e-4 --lr_scheduler_type cosine --warmup_ratio 0.03 --weight_decay 0 \
    --per_device_train_batch_size 6 --max_steps 280 --model_max_length 1024 \
    --precision auto --use_cpu True --seed 0 --report_to none \
    --logging_steps 5 --save_strategy steps --save_steps 40 --save_total_limit 1 \
    --output_dir "$RUN" "$@"
llava mini ship --run-dir "$RUN" --out "$OUT"
llava plot "$RUN"
