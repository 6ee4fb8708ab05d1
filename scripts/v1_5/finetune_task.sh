#!/usr/bin/env bash
# A finished LLaVA trained on for a task of your own: language model and projector.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

setting MODEL liuhaotian/llava-v1.5-7b checkpoints/mini-base "LLaVA checkpoint (liuhaotian/llava-v1.5-13b for 13B)"
setting VERSION v1 smollm2 "conversation template"
setting DATA playground/data/llava_v1_5_mix665k.json "$MINI_DATA/conversations.json" "conversations"
setting IMAGES playground/data "$MINI_DATA" "folder of the images"
setting OUT checkpoints/llava-v1.5-task outputs/mini-task "where the result goes"
setting GLOBAL_BATCH 128 4 "samples per optimizer step, kept by accumulation whatever the number of GPUs"
setting PER_DEVICE 16 2 "samples a GPU takes at once: lower it where memory is short"
setting DEEPSPEED scripts/zero3.json none "DeepSpeed's configuration (scripts/zero3_offload.json saves GPU memory); none: plain DDP"

launch \
    --version "$VERSION" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --learning_rate 2e-5 \
    "$@"
