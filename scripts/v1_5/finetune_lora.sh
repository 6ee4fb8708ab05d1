#!/usr/bin/env bash
# Stage 2 with LoRA, as LLaVA-PruMerge was trained: r 128, alpha 256, lr 2e-4, projector 2e-5, global batch 160
# (LLaVA-1.5's own LoRA recipe is the same with GLOBAL_BATCH=128). REDUCER=prumerge+ trains with fewer tokens.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

setting MODEL lmsys/vicuna-7b-v1.5 checkpoints/mini-base "language model (lmsys/vicuna-13b-v1.5 for 13B)"
setting VERSION v1 smollm2 "conversation template"
setting DATA playground/data/llava_v1_5_mix665k.json "$MINI_DATA/conversations.json" "conversations"
setting IMAGES playground/data "$MINI_DATA" "folder of the images"
setting PROJECTOR checkpoints/llava-v1.5-pretrain/mm_projector.bin "" "mm_projector.bin of pretrain.sh; empty: start anew"
setting OUT checkpoints/llava-v1.5-lora outputs/mini-lora "where the result goes"
setting GLOBAL_BATCH 160 4 "samples per optimizer step, kept by accumulation whatever the number of GPUs"
setting PER_DEVICE 20 2 "samples a GPU takes at once: lower it where memory is short"
setting DEEPSPEED scripts/zero3.json none "DeepSpeed's configuration; none: plain DDP"

launch \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --version "$VERSION" \
    --pretrain_mm_mlp_adapter "$PROJECTOR" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --learning_rate 2e-4 \
    "$@"
