#!/usr/bin/env bash
# Stage 2 with QLoRA: LoRA (r 64, alpha 16) on a language model quantized to 4 bits, for GPUs with little memory.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

setting MODEL lmsys/vicuna-7b-v1.5 checkpoints/mini-base "language model (lmsys/vicuna-13b-v1.5 for 13B)"
setting VERSION v1 smollm2 "conversation template"
setting DATA playground/data/llava_v1_5_mix665k.json "$MINI_DATA/conversations.json" "conversations"
setting IMAGES playground/data "$MINI_DATA" "folder of the images"
setting PROJECTOR checkpoints/llava-v1.5-pretrain/mm_projector.bin "" "mm_projector.bin of pretrain.sh; empty: start anew"
setting OUT checkpoints/llava-v1.5-qlora outputs/mini-qlora "where the result goes"
setting GLOBAL_BATCH 128 4 "samples per optimizer step, kept by accumulation whatever the number of GPUs"
setting PER_DEVICE 16 2 "samples a GPU takes at once: lower it where memory is short"
setting DEEPSPEED scripts/zero2.json none "DeepSpeed's configuration (ZeRO-3 cannot cut up quantized weights); none: plain DDP"

launch \
    --bits 4 --lora_enable True --lora_r 64 --lora_alpha 16 \
    --version "$VERSION" \
    --pretrain_mm_mlp_adapter "$PROJECTOR" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --learning_rate 2e-5 \
    "$@"
