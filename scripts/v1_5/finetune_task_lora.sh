#!/usr/bin/env bash
# A finished LLaVA trained on with LoRA for a task of your own: r 128, alpha 256, lr 2e-4, projector 2e-5.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

setting MODEL liuhaotian/llava-v1.5-7b checkpoints/mini-base "LLaVA checkpoint (liuhaotian/llava-v1.5-13b for 13B)"
setting VERSION v1 smollm2 "conversation template"
setting DATA playground/data/llava_v1_5_mix665k.json "$MINI_DATA/conversations.json" "conversations"
setting IMAGES playground/data "$MINI_DATA" "folder of the images"
setting OUT checkpoints/llava-v1.5-task-lora outputs/mini-task-lora "where the result goes"
setting GLOBAL_BATCH 128 4 "samples per optimizer step, kept by accumulation whatever the number of GPUs"
setting PER_DEVICE 16 2 "samples a GPU takes at once: lower it where memory is short"
setting DEEPSPEED scripts/zero3.json none "DeepSpeed's configuration; none: plain DDP"

launch \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --version "$VERSION" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --learning_rate 2e-4 \
    "$@"
