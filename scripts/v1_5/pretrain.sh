#!/usr/bin/env bash
# Stage 1 of LLaVA-1.5: trains the projector alone, on 558K pairs of image and caption.
# Writes OUT/mm_projector.bin, which the finetune scripts take as PROJECTOR.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

setting MODEL lmsys/vicuna-7b-v1.5 checkpoints/mini-base "language model (lmsys/vicuna-13b-v1.5 for 13B)"
setting DATA playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json "$MINI_DATA/conversations.json" "conversations"
setting IMAGES playground/data/LLaVA-Pretrain/images "$MINI_DATA" "folder of the images"
setting OUT checkpoints/llava-v1.5-pretrain outputs/mini-pretrain "where the result goes"
setting GLOBAL_BATCH 256 4 "samples per optimizer step, kept by accumulation whatever the number of GPUs"
setting PER_DEVICE 32 2 "samples a GPU takes at once: lower it where memory is short"
setting DEEPSPEED scripts/zero2.json none "DeepSpeed's configuration; none: plain DDP"

setting ON_BAD_SAMPLE error skip "error or skip (the scenes of MINI that are no captions)"
launch \
    --version plain \
    --on_bad_sample "$ON_BAD_SAMPLE" \
    --tune_mm_mlp_adapter True \
    --learning_rate 1e-3 \
    "$@"
