#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5: trains the language model and the projector, on the 665K mixture.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

setting MODEL lmsys/vicuna-7b-v1.5 checkpoints/mini-base "language model (lmsys/vicuna-13b-v1.5 for 13B)"
setting VERSION v1 smollm2 "conversation template"
setting DATA playground/data/llava_v1_5_mix665k.json "$MINI_DATA/conversations.json" "conversations"
setting IMAGES playground/data "$MINI_DATA" "folder of the images"
setting PROJECTOR checkpoints/llava-v1.5-pretrain/mm_projector.bin "" "mm_projector.bin of pretrain.sh; empty: start anew"
setting OUT checkpoints/llava-v1.5 outputs/mini-finetune "where the result goes"
setting GLOBAL_BATCH 128 4 "samples per optimizer step, kept by accumulation whatever the number of GPUs"
setting PER_DEVICE 16 2 "samples a GPU takes at once: lower it where memory is short"
setting DEEPSPEED scripts/zero3.json none "DeepSpeed's configuration (scripts/zero3_offload.json saves GPU memory); none: plain DDP"

launch \
    --version "$VERSION" \
    --pretrain_mm_mlp_adapter "$PROJECTOR" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --learning_rate 2e-5 \
    "$@"
